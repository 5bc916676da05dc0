"""Linears that read the same input, computed as one product, with one adapter beside it.

    h = x A^T     y = x W^T + s h B^T      for q, k, v together, and for gate and up

The base is frozen, so its weights may be laid out once for fast products. Only adapters learn here: with g = s dy B
    dx = dy W + g A,     dA = g^T x,     dB = s dy^T h
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tunesmith.cpu.products import Panels, Thin, back_product, product
from tunesmith.models.lora import LoraLinear, LoraWeights
from tunesmith.models.packed import can_pack, joined_bias, page_out, stacked
from tunesmith.models.quantised import QuantisedLinear


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
        self._whole: Panels | None = None  # all members' weights together
        self._beside: tuple[Panels, Panels] | None = None  # the adapter: s B [out, rank], A^T [in, rank]
        self.bias = joined_bias([m.linear.out_features for m in self.members], [m.bias for m in self.members])
        self.quantised = [m.linear for m in self.members if isinstance(m.linear, QuantisedLinear)]
        if self.quantised:
            assert len(self.quantised) == len(self.members), "a base is quantised whole"
            self._make_room_beside(self.quantised[0].dtype)

    def pack(self) -> None:
        """Lay the weights out for fast products, where they can be: a copy that stands in for the weights."""
        if not self.quantised and all(can_pack(member.weight) for member in self.members):
            weights = [member.weight for member in self.members]
            self._whole = Panels.of(stacked(weights))
            self._make_room_beside(torch.float32)
            for weight in weights:
                page_out(weight)

    def unpack(self) -> None:
        """Give the copy back."""
        if not self.quantised:
            self._whole = self._beside = None

    def _make_room_beside(self, dtype: torch.dtype) -> None:
        zeros = partial(torch.zeros, dtype=dtype)
        ups, downs = (Panels.empty(width, self.rank, zeros) for width in (self.out_features, self.in_features))
        self._beside = ups, downs

    def opened(self, name: str, take: Callable[[str, int, int], Tensor]) -> Stack:
        """The stack as it is computed with. Quantised weights are dequantised, once for all slices of rows, into memory
        of that name: `take(name, rows, width)`. Such a stack holds until the next one takes the same."""
        if not self.quantised:
            return self
        stack = copy(self)
        whole = Panels.empty(self.out_features, self.in_features, lambda numbers: take(name, 1, numbers)[0])
        for member, linear in zip(self.members, self.quantised, strict=True):
            matrix = linear.dequantise(out=take("matrix", linear.out_features, linear.in_features))
            whole.write(member.out, slice(0, self.in_features), matrix)
        stack._whole = whole
        return stack

    def down(self) -> Tensor:
        """Every member's A as it is now, [rank, in]."""
        found = [member.adapter.a.detach() for member in self.members if member.adapter is not None]
        return found[0] if len(found) == 1 else torch.cat(found)

    def lay_out_adapter(self) -> None:
        """Beside panels, as it is now: before a forward pass, whose backward uses it too. Safe in several threads: they
        write the same numbers."""
        if self._beside is None:
            return
        ups, downs = self._beside
        for member in self.members:
            if member.adapter is not None:
                ups.write(member.out, member.ranks, member.adapter.b.detach(), member.adapter.scaling)
                downs.write(slice(0, self.in_features), member.ranks, member.adapter.a.detach().t())

    def forward(self, x: Tensor, h: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """out = x (W + s B A)^T + bias (+ residual), and h = x A^T."""
        if self.rank:
            torch.mm(x, self.down().t(), out=h)
        if self._whole is not None:
            product(x, self._whole, out=out, added=residual, bias=self.bias, thin=self._thin(h, 0))
            return
        for member in self.members:
            own = out[:, member.out]
            torch.mm(x, member.weight.t(), out=own)
            if member.bias is not None:
                own += member.bias
            if member.adapter is not None:
                own.addmm_(h[:, member.ranks], member.adapter.b.detach().t(), alpha=member.adapter.scaling)
        if residual is not None:
            out += residual

    def through(self, dy: Tensor, g: Tensor, dx: Tensor) -> Tensor:
        """dx = dy W + g A, returned."""
        if self._whole is not None:
            return back_product(dy, self._whole, out=dx, thin=self._thin(g, 1))
        dx.zero_()
        for member in self.members:
            dx.addmm_(dy[:, member.out], member.weight)
        return dx.addmm_(g, self.down()) if self.rank else dx

    def _thin(self, h: Tensor, which: int) -> Thin | None:
        return None if self._beside is None or not self.rank else (h, self._beside[which])

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
        self.grad_a = like.new_empty(stack.rank, stack.in_features)
        self.grad_b = [adapter.b.new_empty(adapter.b.t().shape) for _, adapter in self.learning]
        self._begun = 0  # whether there is anything to add to

    def add(self, x: Tensor, h: Tensor, dy: Tensor, g: Tensor) -> None:
        if not self.learning:
            return
        for (member, adapter), grad in zip(self.learning, self.grad_b, strict=True):
            grad.addmm_(h[:, member.ranks].t(), dy[:, member.out], beta=self._begun, alpha=adapter.scaling)
        self.grad_a.addmm_(g.t(), x, beta=self._begun)
        self._begun = 1

    def collect(self, into: dict[int, Tensor]) -> None:
        """File the gradients under their parameters' identities."""
        if not self._begun:
            for grad in (self.grad_a, *self.grad_b):
                grad.zero_()
        for (member, adapter), grad in zip(self.learning, self.grad_b, strict=True):
            into[id(adapter.a)] = self.grad_a[member.ranks]
            into[id(adapter.b)] = grad.t()
