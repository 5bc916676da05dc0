"""Rows side by side with ranks of their own, against plain products."""

from __future__ import annotations

import pytest
import torch

from tunesmith.cpu import blocks
from tunesmith.cpu.writing import Processor

USES = {
    "one row": [((3,), 4, 5)],
    "one": [(range(40), 0, 50)],
    "several": [((0, 1, 2), 0, 13), (range(3, 40), 13, 14), ((5,), 20, 45), ((), 45, 50)],
    "apart": [((0, 2, 3, 4, 39), 1, 30), ((1, 5), 30, 34)],
    "a few rows each": [(range(i % 5), 2 * i, 2 * i + 1 + i % 2) for i in range(1, 24)],
    "a long one": [((1,), 0, 1), (range(12), 1, 4), *[((i % 12,), i, i + 1) for i in range(4, 25)]],
}


@pytest.mark.parametrize("what", USES)
@pytest.mark.parametrize(("inner", "widths"), [(64, (96, 32, 32)), (33, (20,)), (100, (7, 40)), (8, (66, 65))])
def test_blocks(on: Processor | None, threads: int, what: str, inner: int, widths: tuple[int, ...]) -> None:
    uses, out = USES[what], sum(widths)
    downs, ups, ends = torch.randn(40, len(widths), inner), torch.randn(40, out), torch.tensor(widths).cumsum(0)
    x, y = torch.randn(50, inner + 1)[:, 1:], torch.randn(50, out + 4)
    before, wanted = y.clone(), y.double()
    for ranks, start, stop in uses:
        rows = list(ranks)
        for linear, begin in enumerate([0, *ends.tolist()][:-1]):
            columns = slice(begin, begin + widths[linear])
            low = x[start:stop].double() @ downs[rows, linear].double().T
            wanted[start:stop, 2:-2][:, columns] += low @ ups[rows, columns].double()
    blocks.add(downs, ups, ends, blocks.Blocks(uses), x, y[:, 2:-2])
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    used = {row for ranks, start, stop in uses for row in range(start, stop) if len(ranks)}
    for row in set(range(50)) - used:
        assert torch.equal(y[row], before[row])


def test_a_row_is_the_same_whatever_stands_beside_it(on: Processor | None, threads: int) -> None:
    downs, ups, ends = torch.randn(40, 2, 70), torch.randn(40, 70), torch.tensor([40, 70])
    x, found = torch.randn(50, 70), []
    for uses in ([(range(3, 40), 0, 50)], [((0, 1), 0, 17), (range(3, 40), 17, 20), ((2,), 20, 50)]):
        y = torch.zeros(50, 70)
        blocks.add(downs, ups, ends, blocks.Blocks(uses), x, y)
        found.append(y[17:20])
    if on is not None:
        assert torch.equal(*found)
