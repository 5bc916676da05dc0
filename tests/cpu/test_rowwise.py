"""The kernels between products, against the same in plain mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tunesmith.cpu import rowwise
from tunesmith.cpu.writing import Processor
from tunesmith.models import fused_ops

WIDTHS = [1, 7, 64, 100]


@pytest.fixture(autouse=True)
def _kernels(on: Processor | None) -> None:
    if on is None:
        pytest.skip("no kernels")


def plain(x: Tensor) -> Tensor:
    return x.double()  # for which there are no kernels


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("groups", [None, 3])
def test_norm_and_its_backward(threads: int, width: int, groups: int | None) -> None:
    shape = (20, width) if groups is None else (20, groups, width)
    x = torch.randn(20, width + 5)[:, 2:-3] if groups is None else torch.randn(shape)
    norm = fused_ops.Norm(torch.rand(width), 1e-5)
    exact = fused_ops.Norm(plain(norm.weight), 1e-5)
    out, expected = torch.empty(shape), torch.empty(shape, dtype=torch.float64)
    rstd, wanted = norm.forward(x, out), exact.forward(plain(x), expected)
    close(out, expected)
    close(rstd, wanted)
    dy, dx = torch.randn(shape), torch.randn(shape)
    expected = plain(dx)
    exact.backward(plain(dy), plain(x), wanted, expected)
    norm.backward(dy, x, rstd, dx)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-4, atol=1e-4)
    norm.forward(x, x)  # in place
    close(x, plain(out))


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_and_its_backward(threads: int, width: int) -> None:
    gate_up, dy = torch.randn(20, 2 * width) * 5, torch.randn(20, width)
    out, d_gate_up = torch.empty(20, width), torch.empty(20, 2 * width)
    expected, d_expected = plain(out), plain(d_gate_up)
    fused_ops.swiglu(plain(gate_up), expected)
    fused_ops.swiglu(gate_up, out)
    close(out, expected)
    fused_ops.swiglu_backward(plain(dy), plain(gate_up), expected, d_expected)
    fused_ops.swiglu_backward(dy, gate_up, out.zero_(), d_gate_up)
    close(out, expected)
    torch.testing.assert_close(d_gate_up.double(), d_expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 7, 64, 1003])
def test_softmax_in_two_parts(threads: int, width: int) -> None:
    x, factor = torch.randn(20, width + 5)[:, 2:-3] * 20 + 50, torch.randn(20, 1)
    expected, lse, top = plain(x), torch.empty(20, 1), torch.empty(20, 1)
    rowwise.normalise(x, lse, top)
    assert torch.equal(top, x.amax(-1, keepdim=True))
    close(lse, expected.logsumexp(-1, keepdim=True))
    rowwise.probabilities(x, lse, factor)
    torch.testing.assert_close(x.double(), expected.softmax(-1) * plain(factor), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("place", [0, 13, 63, 64, 69])
def test_a_number_that_is_none_is_not_lost_in_a_softmax(place: int) -> None:
    x, lse, top = torch.randn(2, 70), torch.empty(2, 1), torch.empty(2, 1)
    x[1, place] = math.nan
    rowwise.normalise(x, lse, top)
    assert lse.isnan().tolist() == top.isnan().tolist() == [[False], [True]]


def test_numbers_where_float32_ends() -> None:
    gate = torch.tensor([[-math.inf, -1e30, -200.0, -88.0, 0.0, 88.0, 1e30, math.inf, math.nan]])
    out = torch.empty_like(gate)
    rowwise.swiglu(torch.cat((gate, torch.ones_like(gate)), 1), out)
    assert out[0, 1:8].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, 88.0, 1e30, math.inf], rel=1e-6, abs=1e-5)
    assert out[0, 8].isnan()


@pytest.mark.parametrize(("dim", "half"), [(8, 4), (64, 32), (20, 5)])
def test_rotary_there_and_back(threads: int, dim: int, half: int) -> None:
    whole = torch.randn(20, 4 * dim)
    x, kept = whole[:, : 3 * dim].unflatten(1, (3, dim)), whole.clone()
    angle = torch.randn(20, 1, half)
    expected = plain(x).clone()
    fused_ops.rotate_(expected, plain(angle.cos()), plain(angle.sin()))
    fused_ops.rotate_(x, angle.cos(), angle.sin())
    close(x, expected)
    assert torch.equal(whole[:, 3 * dim :], kept[:, 3 * dim :])
    fused_ops.rotate_(x, angle.cos(), angle.sin(), back=True)
    close(whole, plain(kept))
