"""How the engine's fast body keeps a base's frozen weights for its products.

Plain numbers are packed anew, laid out for speed. A quantised base is never packed as numbers: its weights are
dequantised whenever they are used, or, in int8 and where that is asked for, its very integers are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.cpu.products import Panels
from tunesmith.cpu.writing import processor
from tunesmith.models.fused_layer import Workspace
from tunesmith.models.lora import LoraModel
from tunesmith.models.packed import PackedLinear, joined_bias
from tunesmith.models.quantised import QuantisedLinear, quantisation, stack_matrices
from tunesmith.tree.heads import Head


class DequantisedLinear:
    """y = x W^T + b over quantised linears that share their input, dequantised at every call: slower than packed
    numbers where rows are few, but nothing more is held than one W."""

    def __init__(self, linears: Sequence[QuantisedLinear], scratch: Workspace) -> None:
        self._linears, self._scratch = linears, scratch
        widths = [linear.out_features for linear in linears]
        self._out, self._in = sum(widths), linears[0].in_features
        self.bias = joined_bias(widths, [linear.bias for linear in linears])
        self.memory: list[Tensor] = []  # kernels read none of it

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """[rows, in] -> [rows, out], new, or added to `onto`."""
        weight = stack_matrices(self._linears, self._scratch.take("weight", self._out, self._in))
        y = torch.mm(x, weight.t()) if onto is None else onto.addmm_(x, weight.t())
        return y if self.bias is None else y.add_(self.bias)


Product = PackedLinear | DequantisedLinear
Packing = Callable[[Sequence[Any]], Product]  # linears that share their input -> the product of all of them


def pack_numbers(linears: Sequence[Any]) -> PackedLinear:
    return PackedLinear.of([linear.weight for linear in linears], [linear.bias for linear in linears])


def pack_integers(linears: Sequence[Any]) -> PackedLinear:
    """The linears of a base in int8."""
    codes, scales = (torch.cat([getattr(linear.stored, name) for linear in linears]) for name in ("codes", "scale"))
    biases = joined_bias([linear.out_features for linear in linears], [linear.bias for linear in linears])
    return PackedLinear(Panels.of(codes, scales[:, 0]), biases)


def leave_quantised() -> Packing:
    """The products share the memory into which they dequantise."""
    scratch = Workspace(torch.empty(0))
    return lambda linears: DequantisedLinear(linears, scratch)


def choose_packing(lora: LoraModel, int8: bool) -> Packing:
    """`int8`: multiply the integers of a base in int8, where this machine can."""
    how = quantisation(lora.model)
    if how is None:
        return pack_numbers
    return pack_integers if int8 and how == "int8" and processor() is not None else leave_quantised()


def pack_head(head: Head, packing: Packing) -> PackedLinear | None:
    """The head, which no base has quantised; None where it is used as it is, because memory counts more than speed."""
    return pack_numbers([head]) if packing in (pack_numbers, pack_integers) else None
