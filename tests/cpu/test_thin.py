"""Rows with ranks of their own, against the same by gathering."""

from __future__ import annotations

import pytest
import torch

from tunesmith.cpu import thin
from tunesmith.cpu.writing import Processor

USES = {
    "few": [((7, 2), 0, 1), ((3,), 1, 2), ((11, 0, 7), 3, 6)],  # row 2 has none
    "many": [(range(i % 5), 2 * i, 2 * i + 1 + i % 2) for i in range(1, 20)],
    "a long one": [((1,), 0, 1), (range(12), 1, 4), *[((i % 12,), i, i + 1) for i in range(4, 25)]],
}


@pytest.mark.parametrize("what", USES)
@pytest.mark.parametrize(("inner", "widths"), [(64, (96, 32, 32)), (33, (20,)), (100, (7, 40))])
def test_add(on: Processor | None, threads: int, what: str, inner: int, widths: tuple[int, ...]) -> None:
    uses, out = USES[what], sum(widths)
    downs, ups, ends = torch.randn(12, len(widths), inner), torch.randn(12, out), torch.tensor(widths).cumsum(0)
    x, y = torch.randn(40, inner + 1)[:, 1:], torch.randn(40, out + 4)
    entries = thin.Entries(uses)
    before, wanted = y.clone(), y.double()[:, 2 : 2 + out]
    for ranks, start, stop in uses:
        for rank in ranks:
            own = torch.einsum("li,ri->lr", downs[rank].double(), x[start:stop].double())
            parts = ups[rank].double().split(widths)
            wanted[start:stop] += torch.cat([own[i, :, None] * part for i, part in enumerate(parts)], 1)
    thin.add(downs, ups, ends, entries, x, y[:, 2 : 2 + out])
    torch.testing.assert_close(y[:, 2 : 2 + out].double(), wanted, rtol=1e-4, atol=1e-4)
    used = {row for _, start, stop in uses for row in range(start, stop)}
    for row in set(range(40)) - used:
        assert torch.equal(y[row], before[row])
    assert torch.equal(y[:, :2], before[:, :2])
    assert torch.equal(y[:, 2 + out :], before[:, 2 + out :])
