"""BM25 over documents or training rows: what to put before a question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import InputError

PASSAGE_WORDS = 120
KNOWLEDGE_ENDINGS = (".txt", ".md", ".rst")


@dataclass(frozen=True, slots=True)
class Passage:
    """Text that may help, and its name."""

    name: str
    text: str


class Index:
    """BM25 (Robertson 1994; Lucene's variant, k1 1.5, b 0.75) by bm25s; ties go to the earlier text."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self._size = len(texts)
        self._bm25: Any = None
        if any(_terms(text) for text in texts):
            self._bm25 = bm25s.BM25()
            self._bm25.index([_terms(text) for text in texts], show_progress=False)

    def nearest(self, query: str, k: int, *, without: int | None = None) -> list[int]:
        """The places of the `k` best texts, best first; `without` leaves one out (a row is not its own example)."""
        terms = _terms(query)
        if self._bm25 is None or not terms:
            scores = np.zeros(self._size)
        else:
            scores = np.asarray(self._bm25.get_scores(terms), dtype=np.float64)
        order = np.argsort(-scores, kind="stable")
        return [int(place) for place in order if place != without][:k]


def read_knowledge(folder: Path) -> list[Passage]:
    """The folder's .txt, .md and .rst files cut into passages of about 120 words at paragraph ends."""
    if not folder.is_dir():
        raise InputError("prove.knowledge must be a folder of .txt or .md files; there is no such folder", file=folder)
    passages: list[Passage] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in KNOWLEDGE_ENDINGS and path.is_file()):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise InputError("this document is not UTF-8 text; save it as UTF-8", file=path) from None
        name = str(path.relative_to(folder))
        passages += [Passage(name, part) for part in cut(text)]
    if not passages:
        raise InputError("prove.knowledge holds no text in .txt, .md or .rst files; put some there", file=folder)
    return passages


def cut(text: str, words: int = PASSAGE_WORDS) -> list[str]:
    """Paragraphs gathered up to `words`; a longer paragraph is cut by itself."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        tokens = paragraph.split()
        pieces += [" ".join(tokens[i : i + words]) for i in range(0, len(tokens), words)]
    gathered: list[str] = []
    for piece in pieces:
        if gathered and len(gathered[-1].split()) + len(piece.split()) <= words:
            gathered[-1] += "\n" + piece
        else:
            gathered.append(piece)
    return gathered


def as_context(texts: Sequence[str]) -> str:
    """Passages numbered, to stand before a question."""
    if not texts:
        return ""
    listed = "\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1))
    return f"Context that may help:\n{listed}\n\n"


def _terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
