"""Adapters at a model's two ends: LoRA over its embedding, and rows of single tokens.

LoRA over an embedding E [vocabulary, hidden] is LoRA over W = E^T, whose input is a token's one-hot row: so A is
[rank, vocabulary] and B [hidden, rank], and a token's embedding is E[t] + s B A[:, t] (DoRA: g times that).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.models.dora import gain

if TYPE_CHECKING:
    from tunesmith.models.lora import LoraWeights, Routing


class LoraEmbedding(nn.Module):
    """A frozen embedding and the adapters over it. Input [..., tokens] with leading dimensions of 1."""

    def __init__(self, base: nn.Embedding, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.adapters: dict[str, LoraWeights] = {}
        self.in_features, self.out_features = base.weight.shape
        self.transposed = False

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def dense(self) -> Tensor:
        """W [hidden, vocabulary]."""
        return self.base.weight.t()

    def forward(self, ids: Tensor) -> Tensor:
        return self.look_up(ids, self.routing.segments)

    def look_up(self, ids: Tensor, segments: Sequence[tuple[str, int, int]]) -> Tensor:
        """[..., tokens] -> [..., tokens, hidden], new; `segments` says which rows use which adapter."""
        y = self.base(ids)
        for name, start, stop in segments:
            adapter = self.adapters.get(name)
            if adapter is None:
                continue
            own = ids[..., start:stop]
            delta = F.linear(F.embedding(own, adapter.a.t()), adapter.b) * (adapter.scaling * self._scale())
            part = y[..., start:stop, :]
            if adapter.magnitude is not None:
                g = gain(self.dense(), adapter)
                part, delta = g * part, g * delta
            part = part + delta.to(y.dtype)
            y = torch.cat((y[..., :start, :], part.to(y.dtype), y[..., stop:, :]), dim=-2)
        return y

    def _scale(self) -> Any:
        """Gemma multiplies what it looks up."""
        return getattr(self.base, "embed_scale", 1.0)
