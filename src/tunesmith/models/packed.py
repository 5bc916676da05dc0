"""Frozen weights laid out for fast products, which are copies, and their originals' memory, given back meanwhile."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.cpu.products import Panels, product

MADV_PAGEOUT = 21  # linux/mman.h, since Linux 5.4


class PackedLinear:
    """y = x W^T + b over linears that share their input, their weights stacked. x [rows, in], float32 on the CPU.

    The weight must not change afterwards.
    """

    def __init__(self, panels: Panels, bias: Tensor | None) -> None:
        self.panels, self.bias = panels, bias

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> PackedLinear:
        """weights: each [out, in]; biases: each [out], or None."""
        return cls(Panels.of(stacked(weights)), joined_bias([len(weight) for weight in weights], biases))

    @property
    def memory(self) -> list[Tensor]:
        """What it reads, in an order of its own."""
        return [self.panels.numbers, *(each for each in (self.panels.scale, self.bias) if each is not None)]

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """[rows, in] -> [rows, out], new, or added to `onto`."""
        return product(x, self.panels, out=onto, added=onto, bias=self.bias)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """[sum of out, in]"""
    return weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])


def joined_bias(widths: Sequence[int], biases: Sequence[Tensor | None]) -> Tensor | None:
    """The biases of linears computed as one, on the CPU; None where none has any. widths: each one's out."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(widths, biases, strict=True)
    return torch.cat([torch.zeros(width) if bias is None else bias.detach() for width, bias in pairs])


def can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


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
