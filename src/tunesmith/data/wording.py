"""Numbers and places in the words of a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from tunesmith.types import Source

LINES_NAMED = 8


def printable(text: str) -> str:
    """Text without the control characters that a terminal would obey and an SVG cannot hold."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else " " for sign in text)


def count(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rows(found: Sequence[object]) -> str:
    """`1 row`, `1,200 rows`, by how many there are."""
    return count(len(found), "row")


def places(sources: Sequence[Source]) -> str:
    """The first few lines of the first file: `a.jsonl lines 3, 7 and 12 more`."""
    first = sources[0].file
    shown = islice((source.line for source in sources if source.file == first), LINES_NAMED)
    return f"{first} {lines([*shown], of=len(sources))}"


def lines(numbers: Sequence[int], *, of: int | None = None) -> str:
    """`line 3`, `lines 3, 7 and 12 more`; `of` is how many there are in all, where not all are in `numbers`."""
    shown = numbers[:LINES_NAMED]
    more = (of or len(numbers)) - len(shown)
    start = f"line{'' if len(shown) == 1 else 's'} {', '.join(map(str, shown))}"
    return f"{start} and {more:,} more" if more else start
