"""Which examples ask the same thing, or nearly the same."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.data.minhash import Labels, cluster_texts
from tunesmith.data.parts import input_text, preamble
from tunesmith.types import Example

ENDINGS = " .,;:!?…\"'`"


@dataclass(frozen=True)
class Likeness:
    """`same[i]` numbers the distinct normalised inputs, `near[i]` the clusters of near-duplicates. Both [examples].

    `keys[i]` is a number in [0, 1) decided by the normalised input alone.
    """

    same: Labels
    near: Labels
    keys: np.ndarray


def normalise(text: str) -> str:
    """Text without the differences that don't count: case, width, white space, marks at its ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split()).strip(ENDINGS)


def uniform(text: str) -> float:
    """A number in [0, 1) decided by a text alone."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def likeness(examples: Sequence[Example]) -> Likeness:
    """Compare the inputs of all examples with one another, standing instructions included."""
    numbers: dict[bytes, int] = {}
    keys: list[float] = []
    same = np.empty(len(examples), np.int64)

    def distinct_texts() -> Iterator[str]:
        """Each different input once, never all of them at a time; fills in `same` and `keys` on its way."""
        for i, example in enumerate(examples):
            text, before = normalise(input_text(example)), preamble(example)
            if before:
                text = f"{normalise(before)}\n{text}"
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
            same[i] = numbers.setdefault(digest, len(keys))
            if same[i] == len(keys):
                keys.append(uniform(text))
                yield text

    near = cluster_texts(distinct_texts())
    return Likeness(same, near[same], np.array(keys)[same]) if len(same) else Likeness(same, same, np.zeros(0))
