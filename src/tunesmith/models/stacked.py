"""Linears that read the same input, computed as one product, with one adapter merged in.

    y = x (W + s B A)^T      for q, k, v together, and for gate and up

W + s B A is written into a buffer just before use: for a few hundred rows that costs less than the adapter's own two
thin products, and is exact to rounding.

The base's weights stay where they are. Only adapters learn here: their gradients need x, dy and the thin products
h = x A^T and g = s dy B:  dA = g^T x,  dB = s dy^T h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.models.lora import LoraLinear, LoraWeights


@dataclass(frozen=True)
class _Member:
    weight: Tensor  # [out, in]
    adapter: LoraWeights | None
    out: slice  # its columns of the stacked output
    ranks: slice  # its columns of the stacked thin product


class Stack:
    """Several linears over one input. Shapes: x [rows, in], y and dy [rows, out], out all members' together."""

    def __init__(self, linears: Sequence[LoraLinear], adapter: str) -> None:
        self.members: list[_Member] = []
        out = rank = 0
        for linear in linears:
            weights = linear.adapters.get(adapter)
            width, thin = linear.out_features, 0 if weights is None else weights.a.shape[0]
            own = _Member(linear.base.weight, weights, slice(out, out + width), slice(rank, rank + thin))
            self.members.append(own)
            out, rank = out + width, rank + thin
        self.in_features, self.out_features, self.rank = linears[0].in_features, out, rank
        biases = [linear.base.bias for linear in linears]
        self.bias = None
        if any(bias is not None for bias in biases):
            parts = [linear.base.weight.new_zeros(linear.out_features) for linear in linears]
            self.bias = torch.cat([p if b is None else b for p, b in zip(parts, biases, strict=True)]).detach()

    def merged(self, out: Tensor) -> Tensor:
        """W + s B A of all members [out, in], written into `out`; the weight itself where there is nothing to merge."""
        if len(self.members) == 1 and self.members[0].adapter is None:
            return self.members[0].weight.detach()
        for member in self.members:
            target, adapter = out[member.out], member.adapter
            if adapter is None:
                target.copy_(member.weight)
            else:
                torch.addmm(member.weight, adapter.b, adapter.a, alpha=adapter.scaling, out=target)
        return out

    def forward(self, x: Tensor, merged: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """out = x W'^T + bias (+ residual)."""
        if residual is None:
            torch.mm(x, merged.t(), out=out)
        else:
            torch.addmm(residual, x, merged.t(), out=out)
        if self.bias is not None:
            out += self.bias


class StackGradients:
    """Adds up one Stack's adapter gradients over slices of rows.

    B's is kept as [rank, out]: a product whose short side comes first runs twice as fast as its transpose.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        adapters = [m.adapter for m in stack.members if m.adapter is not None]
        self.a = torch.cat([adapter.a.detach() for adapter in adapters]) if adapters else None  # [ranks, in]
        self.grad_a = None if self.a is None else torch.zeros_like(self.a)
        self.grad_b = [
            None if m.adapter is None else m.adapter.b.new_zeros(m.adapter.b.t().shape) for m in stack.members
        ]

    def add(self, x: Tensor, dy: Tensor) -> None:
        if self.a is None or self.grad_a is None:
            return
        thin = x @ self.a.t()
        upstream = torch.empty_like(thin)
        for member, grad_b in zip(self.stack.members, self.grad_b, strict=True):
            if member.adapter is None or grad_b is None:
                continue
            own = dy[:, member.out]
            torch.mm(own, member.adapter.b.detach(), out=upstream[:, member.ranks])
            upstream[:, member.ranks] *= member.adapter.scaling
            grad_b.addmm_(thin[:, member.ranks].t(), own, alpha=member.adapter.scaling)
        self.grad_a.addmm_(upstream.t(), x)

    def collect(self, into: dict[int, Tensor]) -> None:
        """File the gradients under their parameters' identities."""
        for member, grad_b in zip(self.stack.members, self.grad_b, strict=True):
            if member.adapter is not None and grad_b is not None and self.grad_a is not None:
                into[id(member.adapter.a)] = self.grad_a[member.ranks]
                into[id(member.adapter.b)] = grad_b.t()
