"""Adapters at a model's two ends: LoRA over its embedding, and rows of single tokens.

LoRA over an embedding E [vocabulary, hidden] is LoRA over W = E^T, whose input is a token's one-hot row: so A is
[rank, vocabulary] and B [hidden, rank], and a token's embedding is E[t] + s B A[:, t] (DoRA: g times that).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.cpu.products import Panels
from tunesmith.models.dora import gain

if TYPE_CHECKING:
    from tunesmith.models.lora import LoraWeights, Routing


@dataclass
class TokenRows:
    """Weights of single tokens that an adapter brings itself, in place of the base's (PEFT's trainable tokens)."""

    ids: Tensor  # [n]
    rows: nn.Parameter  # [n, hidden]

    def looked_up(self, ids: Tensor, y: Tensor, scale: Any = 1.0) -> Tensor:
        """y [..., tokens, hidden], the embeddings of `ids` [..., tokens], with those of the own tokens."""
        same = ids[..., None] == self.ids
        own = self.rows[same.int().argmax(-1)] * scale
        return torch.where(same.any(-1, keepdim=True), own.to(y.dtype), y)

    def scored(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., rows, vocabulary], the head's product of x [..., rows, hidden], with the own tokens' columns."""
        return y.index_copy(-1, self.ids, F.linear(x.to(self.rows.dtype), self.rows).to(y.dtype))


class LoraEmbedding(nn.Module):
    """A frozen embedding and the adapters over it. Input [..., tokens] with leading dimensions of 1."""

    def __init__(self, base: nn.Embedding, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.adapters: dict[str, LoraWeights] = {}
        self.tokens: dict[str, TokenRows] = {}
        self.panels: Panels | None = None  # that hold the base's weight too, and are read in its place
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
        y = self.base(ids) if self.panels is None else self.panels.rows(ids)
        for name, start, stop in segments:
            adapter, tokens = self.adapters.get(name), self.tokens.get(name)
            own, part = ids[..., start:stop], y[..., start:stop, :]
            if tokens is not None:
                part = tokens.looked_up(own, part, self._scale())
            if adapter is not None:
                part = self._turned(adapter, own, part)
            y = torch.cat((y[..., :start, :], part, y[..., stop:, :]), dim=-2)
        return y

    def _turned(self, adapter: LoraWeights, ids: Tensor, y: Tensor) -> Tensor:
        """y [..., tokens, hidden], the embeddings of `ids`, as an adapter makes them."""
        delta = F.linear(F.embedding(ids, adapter.a.t()), adapter.b) * (adapter.scaling * self._scale())
        if adapter.magnitude is not None:
            g = gain(self.dense(), adapter)
            return (g * (y + delta)).to(y.dtype)
        return y + delta.to(y.dtype)

    def _scale(self) -> Any:
        """Gemma multiplies what it looks up."""
        return getattr(self.base, "embed_scale", 1.0)
