"""Frozen weights laid out for oneDNN's product, which beats MKL's by a tenth at hundreds of rows and by two at a few.

They are copies: the weight must not change afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PACKED_FOR = 64  # rows the layout is chosen for; it serves any number
FEWEST_ROWS = 4  # one to three rows take oneDNN a fifth longer than four (AVX-512, 576 x 3072 to 576 x 49152)
MADV_PAGEOUT = 21  # linux/mman.h, since Linux 5.4


class PackedLinear:
    """y = x W^T + b over linears that share their input, their weights stacked. x [rows, in], float32 on the CPU."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> None:
        """weights: each [out, in]; biases: each [out], or None."""
        stacked = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.weight = torch.ops.mkldnn._reorder_linear_weight(stacked.detach(), PACKED_FOR)
        self.bias = joined_bias([len(weight) for weight in weights], biases)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], new."""
        rows = len(x)
        if rows < FEWEST_ROWS:
            x = F.pad(x, (0, 0, 0, FEWEST_ROWS - rows))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")[:rows]


def joined_bias(widths: Sequence[int], biases: Sequence[Tensor | None]) -> Tensor | None:
    """The biases of linears computed as one, on the CPU; None where none has any. widths: each one's out."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(widths, biases, strict=True)
    return torch.cat([torch.zeros(width) if bias is None else bias.detach() for width, bias in pairs])


class PackedPair:
    """A frozen weight packed both ways, for y = x W^T and for the way back, dx = dy W."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        stacked = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.forward = PackedLinear([stacked])
        self.backward = PackedLinear([stacked.t().contiguous()])


def can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def page_out(weight: Tensor) -> None:
    """Ask the system to take back the memory of a weight that will hardly be read: its values stay what they are.

    A base's weights are mapped from their file, so that their pages cost nothing to drop and little to read again.
    """
    if sys.platform != "linux":
        return
    begin, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        # A hint: where it is refused nothing is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT)
