"""`data.balance`: every label, or every file, counts as much as any other, however many rows it has."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from tunesmith.data.lazy import Lazy
from tunesmith.data.parts import labels
from tunesmith.data.tokenize import Tokenized
from tunesmith.errors import InputError
from tunesmith.types import Example, TokenizedExample


def balanced(tokenized: Tokenized, rows: Sequence[Example], by: Literal["label", "source"]) -> Tokenized:
    """Each row's weights times n / (groups * rows of its group): 1 on average over the rows. Raises InputError.

    9 rows "ham" and 1 "spam" weigh 10 / (2 * 9) = 0.56 each and 10 / (2 * 1) = 5: both labels 5 in all.
    """
    if tokenized.together > 1:
        raise InputError("data.balance weighs answers, and preference rows are compared in pairs; set it to null")
    groups = [sys.intern(row.source.file) for row in rows] if by == "source" else labels(rows)
    if groups is None:
        raise InputError(
            "data.balance is label, and the answers are no labels (a few short ones that repeat); "
            "set it to null or source"
        )
    counts = Counter(groups)
    factors = np.array([len(rows) / (len(counts) * counts[group]) for group in groups])[tokenized.rows]

    def weighed(i: int) -> TokenizedExample:
        each = tokenized.examples[i]
        return replace(each, weights=(each.weights * float(factors[i])).astype(np.float32))

    return replace(tokenized, examples=Lazy(len(factors), weighed))
