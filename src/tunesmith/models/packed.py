"""Frozen weights laid out for oneDNN's product, which beats MKL's by a tenth at hundreds of rows and by two at a few.

They are copies: the weight must not change afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PACKED_FOR = 64  # rows the layout is chosen for; it serves any number


class PackedLinear:
    """y = x W^T + b over linears that share their input, their weights stacked. x [rows, in], float32 on the CPU."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> None:
        """weights: each [out, in]; biases: each [out], or None."""
        stacked = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.weight = torch.ops.mkldnn._reorder_linear_weight(stacked.detach(), PACKED_FOR)
        self.bias = None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in pairs]).detach()

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], new."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedPair:
    """A frozen weight packed both ways, for y = x W^T and for the way back, dx = dy W."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        stacked = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.forward = PackedLinear([stacked])
        self.backward = PackedLinear([stacked.t().contiguous()])


def can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
