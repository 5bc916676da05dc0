"""Linears that read the same input, computed as one product, with one adapter beside it.

    h = x A^T     y = x W^T + s h B^T      for q, k, v together, and for gate and up

The base is frozen, so its weights may be laid out once for fast products. Only adapters learn here: with g = s dy B
    dx = dy W + g A,     dA = g^T x,     dB = s dy^T h
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunesmith.cpu.products import Panels, Thin, back_product, product
from tunesmith.models.lora import LoraLinear, LoraWeights
from tunesmith.models.packed import can_pack, joined_bias, page_out, stacked
from tunesmith.models.quantised import QuantisedLinear, stack_matrices


@dataclass(frozen=True)
class _Member:
    linear: nn.Linear | QuantisedLinear
    bias: Tensor | None
    adapter: LoraWeights | None
    out: slice  # its columns of the stacked output
    ranks: slice  # its columns of the stacked thin product

    @property
    def weight(self) -> Tensor:
        """[out, in]"""
        return self.linear.weight.detach()


@dataclass(frozen=True)
class _Matrix:
    """A dequantised weight, for both directions."""

    weight: Tensor  # [out, in]

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight.t())

    def backward(self, dy: Tensor) -> Tensor:
        return torch.mm(dy, self.weight)


class Stack:
    """Several linears over one input. Shapes: x [rows, in], y and dy [rows, out], h and g [rows, rank].

    `out` and `rank` are all members' together.
    """

    def __init__(self, linears: Sequence[LoraLinear], adapter: str) -> None:
        self.members: list[_Member] = []
        out = rank = 0
        for linear in linears:
            weights, base = linear.adapters.get(adapter), linear.base
            assert isinstance(base, nn.Linear | QuantisedLinear)
            width, thin = linear.out_features, 0 if weights is None else weights.a.shape[0]
            columns = slice(out, out + width), slice(rank, rank + thin)
            self.members.append(_Member(base, base.bias, weights, *columns))
            out, rank = out + width, rank + thin
        self.in_features, self.out_features, self.rank = linears[0].in_features, out, rank
        self._whole: Panels | _Matrix | None = None  # all members' weights together
        self._ups = self._downs = Panels(torch.empty(0, 0))  # beside panels: s B [out, rank], A^T [in, rank]
        self.bias = joined_bias([m.linear.out_features for m in self.members], [m.bias for m in self.members])
        self.quantised = [m.linear for m in self.members if isinstance(m.linear, QuantisedLinear)]

    def pack(self) -> None:
        """Lay the weights out for fast products, where they can be: a copy that stands in for the weights."""
        if not self.quantised and all(can_pack(member.weight) for member in self.members):
            weights = [member.weight for member in self.members]
            self._whole = Panels(stacked(weights))
            self._ups = Panels(torch.zeros(self.out_features, self.rank))
            self._downs = Panels(torch.zeros(self.in_features, self.rank))
            for weight in weights:
                page_out(weight)

    def opened(self, scratch: Callable[[int, int], Tensor]) -> Stack:
        """The stack as it is computed with. Quantised weights are dequantised into `scratch(out, in)`, once for all
        slices of rows; such a stack holds until the next one takes the same memory."""
        if not self.quantised:
            return self
        assert len(self.quantised) == len(self.members), "a base is quantised whole"
        stack = copy(self)
        stack._whole = _Matrix(stack_matrices(self.quantised, scratch(self.out_features, self.in_features)))
        return stack

    def down(self) -> Tensor:
        """Every member's A as it is now, [rank, in]."""
        found = [member.adapter.a.detach() for member in self.members if member.adapter is not None]
        return found[0] if len(found) == 1 else torch.cat(found)

    def lay_out_adapter(self) -> None:
        """Beside panels, as it is now: before a forward pass, whose backward uses it too. Safe in several threads: they
        write the same numbers."""
        if not isinstance(self._whole, Panels):
            return
        for member in self.members:
            if member.adapter is not None:
                self._ups.write(member.out, member.ranks, member.adapter.b.detach() * member.adapter.scaling)
                self._downs.write(slice(0, self.in_features), member.ranks, member.adapter.a.detach().t())

    def forward(self, x: Tensor, h: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """out = x (W + s B A)^T + bias (+ residual), and h = x A^T."""
        if self.rank:
            torch.mm(x, self.down().t(), out=h)
        if isinstance(self._whole, Panels):
            product(x, self._whole, out=out, added=residual, bias=self.bias, thin=self._thin(h, self._ups))
            return
        y = out if self._whole is None else self._whole.forward(x)
        for member in self.members:
            own = y[:, member.out]
            if self._whole is None:
                torch.mm(x, member.weight.t(), out=own)
            if member.bias is not None:
                own += member.bias
            if member.adapter is not None:
                own.addmm_(h[:, member.ranks], member.adapter.b.detach().t(), alpha=member.adapter.scaling)
        if residual is not None:
            torch.add(y, residual, out=out)
        elif y is not out:
            out.copy_(y)

    def through(self, dy: Tensor, g: Tensor) -> Tensor:
        """dx = dy W + g A, new."""
        if isinstance(self._whole, Panels):
            return back_product(dy, self._whole, thin=self._thin(g, self._downs))
        if self._whole is not None:
            dx = self._whole.backward(dy)
        else:
            dx = dy.new_zeros(len(dy), self.in_features)
            for member in self.members:
                dx.addmm_(dy[:, member.out], member.weight)
        return dx.addmm_(g, self.down()) if self.rank else dx

    def _thin(self, h: Tensor, panels: Panels) -> Thin | None:
        return (h, panels) if self.rank else None

    def upstream(self, dy: Tensor) -> Tensor:
        """g = s dy B."""
        g = dy.new_empty(len(dy), self.rank)
        for member in self.members:
            if member.adapter is not None:
                into, scaling = g[:, member.ranks], member.adapter.scaling
                torch.addmm(into, dy[:, member.out], member.adapter.b.detach(), beta=0, alpha=scaling, out=into)
        return g


class StackGradients:
    """Adds up one Stack's adapter gradients over slices of rows.

    B's is kept as [rank, out]: a product whose short side comes first runs twice as fast as its transpose.
    """

    def __init__(self, stack: Stack) -> None:
        self.learning = [(member, member.adapter) for member in stack.members if member.adapter is not None]
        like = self.learning[0][1].a if self.learning else torch.empty(0)
        self.grad_a = like.new_zeros(stack.rank, stack.in_features)
        self.grad_b = [adapter.b.new_zeros(adapter.b.t().shape) for _, adapter in self.learning]

    def add(self, x: Tensor, h: Tensor, dy: Tensor, g: Tensor) -> None:
        if not self.learning:
            return
        for (member, adapter), grad in zip(self.learning, self.grad_b, strict=True):
            grad.addmm_(h[:, member.ranks].t(), dy[:, member.out], alpha=adapter.scaling)
        self.grad_a.addmm_(g.t(), x)

    def collect(self, into: dict[int, Tensor]) -> None:
        """File the gradients under their parameters' identities."""
        for (member, adapter), grad in zip(self.learning, self.grad_b, strict=True):
            into[id(adapter.a)] = self.grad_a[member.ranks]
            into[id(adapter.b)] = grad.t()
