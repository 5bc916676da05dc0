"""Balanced, every label or file pulls as hard as any other, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tunesmith.data.balance import balanced
from tunesmith.data.tokenize import Tokenized
from tunesmith.errors import InputError
from tunesmith.types import Example, Source, TokenizedExample


def made(answers, files=None):
    rows, found = [], []
    for i, answer in enumerate(answers):
        messages = ({"role": "user", "content": f"row {i}"}, {"role": "assistant", "content": answer})
        rows.append(Example(f"{i:016x}", Source(files[i] if files else "a", i + 1), "chat", messages=messages))
        found.append(TokenizedExample(rows[-1].id, np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], np.float32)))
    return rows, Tokenized(found, np.arange(len(rows)), (), (), 0)


def test_labels_weigh_the_same_and_the_rows_one_on_average():
    rows, tokenized = made(["ham"] * 18 + ["spam"] * 2)
    weights = [float(each.weights.sum()) / 2 for each in balanced(tokenized, rows, "label").examples]
    assert weights == pytest.approx([20 / 36] * 18 + [5.0] * 2)
    assert sum(weights[:18]) == pytest.approx(sum(weights[18:]))
    assert all(each.weights[:2].tolist() == [0, 0] for each in balanced(tokenized, rows, "label").examples)
    assert tokenized.examples[0].weights.tolist() == [0, 0, 1, 1]  # the rows given stay as they were


def test_files_weigh_the_same():
    rows, tokenized = made([f"answer {i}" for i in range(8)], ["a"] * 6 + ["b"] * 2)
    weights = [float(each.weights[-1]) for each in balanced(tokenized, rows, "source").examples]
    assert weights == pytest.approx([8 / 12] * 6 + [2.0] * 2)


def test_what_has_no_labels_or_comes_in_pairs_is_refused():
    rows, tokenized = made([f"a long answer of its own, number {i}" for i in range(20)])
    with pytest.raises(InputError, match=r"data\.balance is label.*no labels"):
        balanced(tokenized, rows, "label")
    with pytest.raises(InputError, match="in pairs"):
        balanced(replace(tokenized, together=2), rows, "source")
