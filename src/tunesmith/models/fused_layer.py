"""One Llama-like decoder layer, forward and backward by hand.

    x   -> norm -> q, k, v -> rotary -> attention -> o    + x   = mid
    mid -> norm -> gate, up -> silu(gate) * up    -> down + mid = x of the next layer

Rows go through it in slices small enough for the cache, with the adapter merged into the weights. Kept for the backward
are only results of products; norms and the activation are cheaper to compute again than to fetch from memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.models.fused_ops import Norm, rotate_, swiglu, swiglu_backward
from tunesmith.models.stacked import Stack, StackGradients

SLICE = 512  # rows; enough for products at full speed, few enough that what is between them stays in cache


class Attention(Protocol):
    """Attention over the rows of one pass. Queries [rows, heads, dim], keys and values [rows, kv_heads, dim]."""

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """Writes the output, shaped as q; returns what the backward needs besides."""
        ...

    def backward(
        self,
        layer: int,
        forward: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        d_out: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Writes the gradients of q, k, v into `grads`. `forward`: q, k, v, the output, what forward returned."""
        ...


@dataclass
class Kept:
    """What one layer's backward needs. The tail of a layer may run on fewer rows than its attention."""

    x: Tensor  # [rows, hidden]
    raw: Tensor  # [rows, q + k] before the norms on heads; of no width where there are none
    qkv: Tensor  # [rows, q + k + v] after rotary
    attended: Tensor  # [rows, q]
    mid: Tensor  # [tail rows, hidden]
    gate_up: Tensor  # [tail rows, 2 * intermediate]
    extra: Tensor | None = None  # the attention's own


class MergedWeights:
    """Every stack's weights with the adapter in them, made once a step. For several threads."""

    def __init__(self) -> None:
        self._buffers: dict[Stack, Tensor] = {}
        self._fresh: set[Stack] = set()
        self._lock = threading.Lock()

    def forget(self) -> None:
        """The adapter is about to change."""
        self._fresh.clear()

    def of(self, stack: Stack) -> Tensor:
        with self._lock:
            if stack not in self._fresh:
                buffer = self._buffers.get(stack)
                if buffer is None:
                    buffer = stack.members[0].weight.new_empty(stack.out_features, stack.in_features)
                self._buffers[stack] = stack.merged(buffer)
                self._fresh.add(stack)
            return self._buffers[stack]


class Workspace:
    """Buffers shared by all layers, made when first asked for."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}
        self.steady: MergedWeights | None = None  # while the adapter stays as it is

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """[rows, width], contiguous, with whatever was there before."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < rows * width:
            buffer = self.buffers[name] = self.like.new_empty(rows * width)
        return buffer[: rows * width].view(rows, width)

    def merged(self, name: str, stack: Stack) -> Tensor:
        if self.steady is not None:
            return self.steady.of(stack)
        return stack.merged(self.take(name, stack.out_features, stack.in_features))


@dataclass(frozen=True)
class Geometry:
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def k(self) -> int:
        return self.kv_heads * self.head_dim

    def by_head(self, x: Tensor) -> Tensor:
        """[rows, heads * dim] -> [rows, heads, dim], a view."""
        return x.unflatten(-1, (-1, self.head_dim))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, q + k + v] -> q, k, v by head; views."""
        q, k, v = qkv.split((self.q, self.k, self.k), dim=-1)
        return self.by_head(q), self.by_head(k), self.by_head(v)


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward or backward share."""

    rope: tuple[Tensor, Tensor]  # cos and sin, [rows, 1, rotated dimensions / 2] each
    attention: Attention
    work: Workspace


@dataclass(frozen=True)
class FusedLayer:
    index: int
    geometry: Geometry
    input_norm: Norm
    qkv: Stack
    head_norms: tuple[Norm, Norm] | None  # on every head of q, of k (Qwen3)
    o: Stack
    mlp_norm: Norm
    gate_up: Stack
    down: Stack

    @property
    def learns(self) -> bool:
        return any(stack.rank for stack in (self.qkv, self.o, self.gate_up, self.down))

    def forward(self, here: Pass, kept: Kept, x_next: Tensor, rows: Tensor | None = None) -> None:
        """Fills `kept`, whose x is given, and x_next; with `rows` [tail rows] only those, in that order."""
        geometry, work = self.geometry, here.work
        merged = work.merged("qkv", self.qkv)
        for s in slices(len(kept.x)):
            normed = work.take("normed", s.stop - s.start, self.qkv.in_features)
            self.input_norm.forward(kept.x[s], normed)
            self.qkv.forward(normed, merged, kept.qkv[s])
            q_and_k = kept.qkv[s, : geometry.q + geometry.k]
            if self.head_norms is not None:
                kept.raw[s] = q_and_k
                for norm, part in zip(self.head_norms, (slice(geometry.q), slice(geometry.q, None)), strict=True):
                    norm.forward(geometry.by_head(kept.raw[s, part]), geometry.by_head(q_and_k[:, part]))
            rotate_(geometry.by_head(q_and_k), here.rope[0][s], here.rope[1][s])
        q, k, v = geometry.split(kept.qkv)
        kept.extra = here.attention.forward(self.index, q, k, v, geometry.by_head(kept.attended))
        self._tail(work, kept, x_next, rows)

    def _tail(self, work: Workspace, kept: Kept, x_next: Tensor, rows: Tensor | None) -> None:
        x, attended = (kept.x, kept.attended) if rows is None else (kept.x[rows], kept.attended[rows])
        merged = [work.merged(name, stack) for name, stack in (("o", self.o), ("gu", self.gate_up), ("d", self.down))]
        for s in slices(len(x)):
            self.o.forward(attended[s], merged[0], kept.mid[s], residual=x[s])
            normed = work.take("normed", s.stop - s.start, self.gate_up.in_features)
            self.mlp_norm.forward(kept.mid[s], normed)
            self.gate_up.forward(normed, merged[1], kept.gate_up[s])
            active = work.take("active", s.stop - s.start, self.geometry.intermediate)
            swiglu(kept.gate_up[s], active)
            self.down.forward(active, merged[2], x_next[s], residual=kept.mid[s])

    def backward(
        self,
        here: Pass,
        kept: Kept,
        dx: Tensor,
        grads: dict[int, Tensor],
        *,
        rows: Tensor | None = None,
        wants_dx: bool = True,
    ) -> Tensor:
        """dx [tail rows, hidden] of x_next, overwritten -> gradient of x (garbage unless wanted). Fills `grads`."""
        geometry, work = self.geometry, here.work
        d_attended = work.take("d_attended", len(kept.x), geometry.q)
        if rows is None:
            self._tail_backward(work, kept, kept.attended, dx, d_attended, grads)
        else:
            part = work.take("d_part", len(rows), geometry.q)
            self._tail_backward(work, kept, kept.attended[rows], dx, part, grads)
            d_attended.zero_().index_copy_(0, rows, part)
            dx = dx.new_zeros(len(kept.x), dx.shape[1]).index_copy_(0, rows, dx)
        d_qkv = work.take("d_qkv", len(kept.x), self.qkv.out_features)
        assert kept.extra is not None
        forward = (*geometry.split(kept.qkv), geometry.by_head(kept.attended), kept.extra)
        here.attention.backward(self.index, forward, geometry.by_head(d_attended), geometry.split(d_qkv))
        self._qkv_backward(here, kept, d_qkv, dx, grads, wants_dx)
        return dx

    def _tail_backward(
        self, work: Workspace, kept: Kept, attended: Tensor, dx: Tensor, d_attended: Tensor, grads: dict[int, Tensor]
    ) -> None:
        """dx of the layer's output becomes dx of `mid`; writes the gradient of what attention gave."""
        o, gate_up, down = StackGradients(self.o), StackGradients(self.gate_up), StackGradients(self.down)
        merged = [work.merged(name, stack) for name, stack in (("o", self.o), ("gu", self.gate_up), ("d", self.down))]
        for s in slices(len(dx)):
            count, wide = s.stop - s.start, self.geometry.intermediate
            d_active, active = work.take("d_active", count, wide), work.take("active", count, wide)
            torch.mm(dx[s], merged[2], out=d_active)
            d_gate_up = work.take("d_gate_up", count, 2 * wide)
            swiglu_backward(d_active, kept.gate_up[s], active, d_gate_up)
            down.add(active, dx[s])
            normed = work.take("normed", count, dx.shape[1])
            rstd = self.mlp_norm.forward(kept.mid[s], normed)
            gate_up.add(normed, d_gate_up)
            d_normed = torch.mm(d_gate_up, merged[1], out=normed)
            self.mlp_norm.backward(d_normed, kept.mid[s], rstd, dx[s])
            o.add(attended[s], dx[s])
            torch.mm(dx[s], merged[0], out=d_attended[s])
        for gradients in (o, gate_up, down):
            gradients.collect(grads)

    def _qkv_backward(
        self, here: Pass, kept: Kept, d_qkv: Tensor, dx: Tensor, grads: dict[int, Tensor], wants_dx: bool
    ) -> None:
        geometry, gradients = self.geometry, StackGradients(self.qkv)
        merged = here.work.merged("qkv", self.qkv)
        for s in slices(len(dx)):
            d_q_and_k = d_qkv[s, : geometry.q + geometry.k]
            rotate_(geometry.by_head(d_q_and_k), here.rope[0][s], -here.rope[1][s])
            if self.head_norms is not None:
                for norm, part in zip(self.head_norms, (slice(geometry.q), slice(geometry.q, None)), strict=True):
                    norm.backward_in_place(geometry.by_head(d_q_and_k[:, part]), geometry.by_head(kept.raw[s, part]))
            normed = here.work.take("normed", s.stop - s.start, dx.shape[1])
            rstd = self.input_norm.forward(kept.x[s], normed)
            gradients.add(normed, d_qkv[s])
            if wants_dx:
                d_normed = torch.mm(d_qkv[s], merged, out=normed)
                self.input_norm.backward(d_normed, kept.x[s], rstd, dx[s])
        gradients.collect(grads)


def slices(rows: int) -> Iterator[slice]:
    """Cuts [0, rows) evenly into slices of at most SLICE."""
    count = -(-rows // SLICE)
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)
