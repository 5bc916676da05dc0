"""Layers that are alike: the first is run by the interpreter, the others as the kernels it called, moved.

For a few rows the interpreter takes as long as the kernels. Layers that are alike call the same kernels with the
same sizes on other weights and another part of the cache; what lies between is the same memory for all of them. So a
layer's calls, with the addresses of its own memory replaced by those of another's, are the other's. Whether that holds
is tried where calls are seen for the first time: all layers are run both ways, and only what gives the same bits is
ever repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.cpu.tape import Ints, Moved, watching


@dataclass(frozen=True)
class Memory:
    """What each layer has to itself: [layers, pieces] addresses, of pieces that layers of a kind have alike."""

    addresses: Ints
    sizes: Ints  # in bytes

    @classmethod
    def of(cls, layers: Sequence[Sequence[Tensor]]) -> Memory:
        """layers: the tensors of each, contiguous."""
        addresses, sizes = np.zeros((2, len(layers), max(map(len, layers), default=0)), np.int64)
        for layer, tensors in enumerate(layers):
            addresses[layer, : len(tensors)] = [each.data_ptr() for each in tensors]
            sizes[layer, : len(tensors)] = [each.nbytes for each in tensors]
        return cls(addresses, sizes)

    def beside(self, *others: Memory) -> Memory:
        memories = (self, *others)
        return Memory(*(np.concatenate([getattr(m, name) for m in memories], 1) for name in ("addresses", "sizes")))


class Repeats:
    """The kinds of calls of one body that may be repeated."""

    def __init__(self) -> None:
        self._proven: dict[bytes, bool] = {}

    def run(self, call: Callable[[int, Tensor], None], x: Tensor, kinds: Sequence[Hashable], memory: Memory) -> None:
        """All layers on x [rows, hidden], in place. call(i, x) runs one; kinds: what is the same for layers that are
        alike."""
        found: dict[Hashable, Moved | None] = {}
        for layer, kind in enumerate(kinds):
            if (moved := found.get(kind)) is not None:
                moved.play(layer)
                continue
            alike = [other for other in range(layer + 1, len(kinds)) if kinds[other] == kind]
            if kind in found or not alike:
                call(layer, x)
                continue
            start = x.clone()
            with watching() as tape:
                call(layer, x)
            found[kind] = moved = tape.moved(memory.addresses, memory.sizes[layer], layer) if tape.sound else None
            if moved is not None and not self._holds(moved, call, x, alike):
                found[kind] = None
                call(layer, start)  # what it had written may be lost

    def _holds(self, moved: Moved, call: Callable[[int, Tensor], None], x: Tensor, alike: Sequence[int]) -> bool:
        """Whether layers that are yet to come, and will write to the cache again, give the same both ways."""
        if moved.signature not in self._proven:
            before = x.clone()
            self._proven[moved.signature] = all(self._same(moved, call, x.copy_(before), layer) for layer in alike)
            x.copy_(before)
        return self._proven[moved.signature]

    def _same(self, moved: Moved, call: Callable[[int, Tensor], None], x: Tensor, layer: int) -> bool:
        expected = x.clone()
        call(layer, expected)
        moved.play(layer)
        return torch.equal(x, expected)
