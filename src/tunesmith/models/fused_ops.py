"""The element-wise steps of a decoder layer, forward and backward by hand, over a slice of rows that stays in cache.

One pass each by a kernel where there is one, else in PyTorch's operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tunesmith.cpu import rowwise


@dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): y = weight * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps)."""

    weight: Tensor  # [features]
    eps: float

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Writes y into `out`, which may be x; returns rstd [..., 1]."""
        if rowwise.usable(x):
            rstd = x.new_empty(*x.shape[:-1], 1)
            rowwise.norm(x, self.weight, self.eps, out, rstd)
            return rstd
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        torch.mul(x, rstd, out=out).mul_(self.weight)
        return rstd

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor, add_to: Tensor) -> None:
        """Adds dx = rstd * (w dy) - x * rstd^3 * mean(w dy x) to `add_to`. Overwrites dy."""
        if rowwise.usable(x):
            rowwise.norm_backward(dy, x, rstd, self.weight, add_to)
            return
        dy.mul_(self.weight)
        mean = (dy * x).sum(-1, keepdim=True).div_(x.shape[-1])
        add_to.addcmul_(dy, rstd).addcmul_(x, mean.mul_(rstd.pow(3)), value=-1)

    def backward_in_place(self, dy: Tensor, x: Tensor) -> None:
        """Turns dy into dx."""
        dx, scratch = torch.zeros_like(x), torch.empty_like(x)
        rstd = self.forward(x, scratch)
        self.backward(dy, x, rstd, dx)
        dy.copy_(dx)


def norm_of(module: Any) -> Norm:
    """A model's own norm, as it is now."""
    return Norm(module.weight.detach(), float(module.variance_epsilon))


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) in place on the first 2 * half dimensions of each head.

    x [rows, heads, dim]; cos, sin [rows, 1, half]. `back`: the other way round, which is its backward.
    """
    if rowwise.usable(x):
        rowwise.rotate(x, cos, sin, back=back)
        return
    sin = -sin if back else sin
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    kept = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(kept)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up (Shazeer 2020, arXiv:2002.05202); gate_up [rows, 2 * width], out [rows, width]."""
    if rowwise.usable(out):
        rowwise.swiglu(gate_up, out)
        return
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


def swiglu_backward(dy: Tensor, gate_up: Tensor, out: Tensor, d_gate_up: Tensor) -> None:
    """Writes silu(gate) * up into `out` and the gradients of gate and up into `d_gate_up`. Overwrites dy."""
    if rowwise.usable(out):
        rowwise.swiglu_backward(dy, gate_up, out, d_gate_up)
        return
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    torch.mul(silu, up, out=out)
    torch.mul(dy, silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(dy.mul_(up), gate, grad_input=d_gate)
