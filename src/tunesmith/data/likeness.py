"""Which examples ask the same thing, or nearly the same."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.data.minhash import Labels, cluster, shingle_sets
from tunesmith.data.parts import input_text, preamble
from tunesmith.types import Example

ENDINGS = " .,;:!?…\"'`"
CODES = 2.0**64


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


def code(text: str) -> int:
    """A number below 2^64 decided by a text alone; two texts of a million have the same by a chance of 3 in 10^8."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big")


def uniform(text: str) -> float:
    """A number in [0, 1) decided by a text alone."""
    return code(text) / CODES


def likeness(examples: Sequence[Example]) -> Likeness:
    """Compare the inputs of all examples with one another, standing instructions included."""
    codes = array("Q")

    def texts() -> Iterator[str]:
        """What each example asks, never all of them at a time; fills in `codes` on its way."""
        for example in examples:
            text, before = normalise(input_text(example)), preamble(example)
            if before:
                text = f"{normalise(before)}\n{text}"
            codes.append(code(text))
            yield text

    sets = shingle_sets(texts())
    same, first = numbered(np.frombuffer(codes, np.uint64))
    return Likeness(same, cluster(sets.only(first))[same], np.frombuffer(codes, np.uint64) / CODES)


def numbered(values: npt.NDArray[Any]) -> tuple[Labels, Labels]:
    """Equal values as one number, counted as they first appear, and where they do: 7 5 7 -> (0 1 0), (0 1)."""
    _, first, of = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(first), np.int64)
    number[order] = np.arange(len(first))
    return number[of], first[order]
