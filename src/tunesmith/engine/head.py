"""The output head as the engine runs it: the base's product for all rows, then what each row's adapter does to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tunesmith.models.lora import LoraLinear
from tunesmith.models.packed import PackedLinear
from tunesmith.tree.heads import Head


class AdaptedHead:
    """A model's output head. `product` is a copy of its weight that answers faster."""

    def __init__(self, head: Head, layer: LoraLinear | None, product: PackedLinear | None) -> None:
        self._head, self._layer, self._packed = head, layer, product

    def logits(self, hidden: Tensor, names: Sequence[str | None]) -> Tensor:
        """hidden [rows, hidden] and each row's adapter -> [rows, vocabulary]."""
        y = F.linear(hidden, self._head.weight, self._head.bias) if self._packed is None else self._packed(hidden)
        layer = self._layer
        if layer is not None and (layer.adapters or layer.tokens):
            for name in dict.fromkeys(name for name in names if name is not None):
                rows = torch.tensor([row for row, own in enumerate(names) if own == name], device=y.device)
                y[rows] = layer.turned(name, hidden[rows], y[rows])
        return self._head.finish(y)
