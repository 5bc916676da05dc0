"""Marking where an answer differs from the expected one, word by word."""

from __future__ import annotations

import difflib
import re

from markupsafe import Markup, escape

LONGEST = 400  # words compared; what follows is shown unmarked
TOO_DIFFERENT = 0.3  # an answer that shares less than this with the expected one is not worth marking word by word
_TOKENS = re.compile(r"\w+|\s+|[^\w\s]")


def marked(answer: str, expected: str | None) -> Markup:
    """The answer as HTML: words that aren't expected in <ins>, expected words that are missing in <del>."""
    if expected is None:
        return escape(answer)
    said, wanted = _TOKENS.findall(answer), _TOKENS.findall(expected)
    tail = "".join(said[LONGEST:])
    said, wanted = said[:LONGEST], wanted[:LONGEST]
    parts: list[Markup] = []
    matcher = difflib.SequenceMatcher(None, said, wanted, autojunk=False)
    if matcher.ratio() < TOO_DIFFERENT:
        return escape(answer)
    for what, a, b, c, d in matcher.get_opcodes():
        here, there = "".join(said[a:b]), "".join(wanted[c:d])
        if what == "equal":
            parts.append(escape(here))
            continue
        if there.strip():
            parts.append(Markup("<del>{}</del>").format(there))
        if here.strip():
            parts.append(Markup("<ins>{}</ins>").format(here))
        elif here:
            parts.append(escape(here))
    return Markup("").join([*parts, escape(tail)])
