"""Rows with ranks of their own, against the same by gathering."""

from __future__ import annotations

import pytest
import torch

from tunesmith.cpu import thin
from tunesmith.cpu.writing import Processor


@pytest.mark.parametrize(("linears", "inner", "out"), [(3, 64, 96), (1, 33, 20), (2, 100, 7)])
def test_down_and_up(on: Processor | None, threads: int, linears: int, inner: int, out: int) -> None:
    downs, ups = torch.randn(12, linears, inner), torch.randn(12, out)
    ranks, owners = torch.tensor([7, 2, 3, 11, 0, 7]), torch.tensor([0, 0, 1, 3, 3, 3])  # row 2 has none
    x, y = torch.randn(4, inner + 1)[:, 1:], torch.randn(4, out + 4)
    expected = torch.einsum("eli,ei->le", downs[ranks].double(), x[owners].double())
    low = thin.down(downs, ranks, owners, x)
    torch.testing.assert_close(low.double(), expected, rtol=1e-4, atol=1e-4)
    before, wanted = y.clone(), y.double()
    wanted[:, 2 : 2 + out].index_add_(0, owners, low[0][:, None].double() * ups[ranks].double())
    thin.up(ups, ranks, owners, low[0], y[:, 2 : 2 + out])
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[2], before[2])
