"""Linears that read the same input, computed as one product, with one adapter beside it.

    h = x A^T     y = x W^T + s h B^T      for q, k, v together, and for gate and up

The base is frozen, so its weights may be laid out once for fast products. Only adapters learn here: with g = s dy B
    dx = dy W + g A,     dA = g^T x,     dB = s dy^T h
DoRA's y is that times its gains (tunesmith.models.dora), whose lengths are a constant to the gradient: with dy times
them in dy's place the rest is the same, and dm = sum of dy y / m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tunesmith.cpu import narrow
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
    squares: Tensor | None  # |W|^2 of every output [out], for magnitudes

    @property
    def weight(self) -> Tensor:
        """[out, in]"""
        return self.linear.weight.detach()


@dataclass
class _LaidOut:
    """The adapter as products take it."""

    ups: Panels | None = None  # s B [out, rank], beside a base in panels
    downs: Panels | None = None  # A^T [in, rank], likewise
    down: Tensor | None = None  # A^T for narrow.product


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
            squares = None
            if weights is not None and weights.magnitude is not None:
                squares = torch.linalg.vector_norm(base.weight.detach(), dim=1).square_()
            self.members.append(_Member(base, base.bias, weights, *columns, squares))
            out, rank = out + width, rank + thin
        self.in_features, self.out_features, self.rank = linears[0].in_features, out, rank
        found = next((m.squares for m in self.members if m.squares is not None), None)
        self.gains = None if found is None else found.new_ones(out)  # [out], of DoRA
        self._whole: Panels | None = None  # all members' weights together
        self._adapter = _LaidOut()
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
            self._whole, self._adapter = None, _LaidOut()

    def _make_room_beside(self, dtype: torch.dtype) -> None:
        zeros = partial(torch.zeros, dtype=dtype)
        ups, downs = (Panels.empty(width, self.rank, zeros) for width in (self.out_features, self.in_features))
        ups.keep_to_bands([(member.out, member.ranks) for member in self.members])
        self._adapter = _LaidOut(ups, downs)

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
        """As it is now, and its gains: before a forward pass, whose backward uses them too. Safe in several threads:
        they write the same numbers."""
        if self.gains is not None:
            self._write_gains(self.gains)
        if not self.rank:
            return
        down, laid_out = self.down(), self._adapter
        laid_out.down = narrow.turned(down)
        if laid_out.downs is not None:
            laid_out.downs.write(slice(0, self.in_features), slice(0, self.rank), down.t())
        if laid_out.ups is not None:
            for member in self.members:
                if member.adapter is not None:
                    laid_out.ups.write(member.out, member.ranks, member.adapter.b.detach(), member.adapter.scaling)

    def _write_gains(self, gains: Tensor) -> None:
        """m / |W + s B A|, where |W + s B A|^2 = |W|^2 + (2 s W A^T + s^2 B A A^T) . B for every output."""
        for member in self.members:
            adapter = member.adapter
            if adapter is None or adapter.magnitude is None or member.squares is None:
                continue
            a, b, s = adapter.a.detach(), adapter.b.detach(), adapter.scaling
            if self._whole is None:
                along = member.weight @ a.t()  # [out, rank]
            else:
                panels, before = self._whole.part(member.out)
                along = product(a, panels)[:, before:].t()
            squares = torch.addmm(along, b, a @ a.t(), beta=2 * s, alpha=s * s).mul_(b).sum(1).add_(member.squares)
            gains[member.out] = adapter.magnitude.detach() / squares.sqrt_()

    def forward(
        self, x: Tensor, h: Tensor, out: Tensor, residual: Tensor | None = None, own: Tensor | None = None
    ) -> None:
        """out = x (W + s B A)^T + bias (+ residual), and h = x A^T. With gains, x (W + s B A)^T times them; `own`
        [rows, out], wanted with a residual, is then the output without it."""
        if self.gains is not None:
            own = out if own is None else own
            self._forward(x, h, own, None, None)
            own *= self.gains
            if self.bias is not None:
                own += self.bias
            if residual is not None:
                torch.add(own, residual, out=out)
            return
        self._forward(x, h, out, residual, self.bias)

    def _forward(self, x: Tensor, h: Tensor, out: Tensor, residual: Tensor | None, bias: Tensor | None) -> None:
        if self.rank:
            assert self._adapter.down is not None, "the adapter was not laid out"
            narrow.product(x, self._adapter.down, h)
        if self._whole is not None:
            product(x, self._whole, out=out, added=residual, bias=bias, thin=self._beside(h, self._adapter.ups))
            return
        for member in self.members:
            own = out[:, member.out]
            torch.mm(x, member.weight.t(), out=own)
            if member.adapter is not None:
                own.addmm_(h[:, member.ranks], member.adapter.b.detach().t(), alpha=member.adapter.scaling)
        for more in (bias, residual):
            if more is not None:
                out += more

    def through(self, dy: Tensor, g: Tensor, dx: Tensor) -> Tensor:
        """dx = dy W + g A, returned."""
        if self._whole is not None:
            return back_product(dy, self._whole, out=dx, thin=self._beside(g, self._adapter.downs))
        dx.zero_()
        for member in self.members:
            dx.addmm_(dy[:, member.out], member.weight)
        return dx.addmm_(g, self.down()) if self.rank else dx

    def _beside(self, h: Tensor, panels: Panels | None) -> Thin | None:
        return None if panels is None or not self.rank else (h, panels)

    def upstream(self, dy: Tensor) -> Tensor:
        """g = s dy B."""
        g = dy.new_empty(len(dy), self.rank)
        for member in self.members:
            if member.adapter is not None:
                b, scaling = member.adapter.b.detach(), member.adapter.scaling
                narrow.product(dy[:, member.out], b, g[:, member.ranks], scaling)
        return g


class StackGradients:
    """Adds up one Stack's adapter gradients over slices of rows.

    B's is kept as [rank, out]: a product whose short side comes first runs twice as fast as its transpose.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.learning = [(member, member.adapter) for member in stack.members if member.adapter is not None]
        like = self.learning[0][1].a if self.learning else torch.empty(0)
        self.grad_a = like.new_empty(stack.rank, stack.in_features)
        self.grad_b = [adapter.b.new_empty(adapter.b.t().shape) for _, adapter in self.learning]
        self.grad_m = None if stack.gains is None else torch.zeros_like(stack.gains)  # times m
        self._begun = False  # whether there is anything to add to

    def entering(self, dy: Tensor, y: Tensor, take: Callable[[str, int, int], Tensor]) -> Tensor:
        """dy as the products see it: with gains, times these, in memory from `take` (as Stack.opened has it). y
        [rows, out] is what came out, without a residual."""
        gains, bias = self.stack.gains, self.stack.bias
        if gains is None or self.grad_m is None:
            return dy
        entering = take("entering", *dy.shape)
        torch.mul(dy, y if bias is None else y - bias, out=entering)
        self.grad_m += entering.sum(0)
        return torch.mul(dy, gains, out=entering)

    def add(self, x: Tensor, h: Tensor, dy: Tensor, g: Tensor) -> None:
        if not self.learning:
            return
        for (member, adapter), grad in zip(self.learning, self.grad_b, strict=True):
            narrow.product(h[:, member.ranks].t(), dy[:, member.out], grad, adapter.scaling, adds=self._begun)
        narrow.product(g.t(), x, self.grad_a, adds=self._begun)
        self._begun = True

    def collect(self, into: dict[int, Tensor]) -> None:
        """File the gradients under their parameters' identities."""
        if not self._begun:
            for grad in (self.grad_a, *self.grad_b):
                grad.zero_()
        for (member, adapter), grad in zip(self.learning, self.grad_b, strict=True):
            into[id(adapter.a)] = self.grad_a[member.ranks]
            into[id(adapter.b)] = grad.t()
            if self.grad_m is not None and adapter.magnitude is not None:
                into[id(adapter.magnitude)] = self.grad_m[member.out] / adapter.magnitude.detach()
