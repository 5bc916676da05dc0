"""One Llama-like decoder layer, forward and backward by hand.

    x   -> norm -> q, k, v -> rotary -> attention -> o    + x   = mid
    mid -> norm -> gate, up -> silu(gate) * up    -> down + mid = x of the next layer

Rows go through it in slices small enough for the cache. Kept for the backward are only results of products; norms and
the activation are cheaper to compute again than to fetch from memory.
"""

from __future__ import annotations

import itertools
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
    raw: Tensor  # [rows, q + k] before the norms on heads and rotary, for these norms and magnitudes; else of no width
    qkv: Tensor  # [rows, q + k + v] after rotary
    attended: Tensor  # [rows, q]
    mid: Tensor  # [tail rows, hidden]
    gate_up: Tensor  # [tail rows, 2 * intermediate]
    own: Tensor  # [tail rows, 2 * hidden] what o and down gave, without residual; of no width but for magnitudes
    thin: tuple[Tensor, ...]  # the adapters' h of qkv [rows, rank], of o, gate_up and down [tail rows, rank]
    extra: Tensor | None = None  # the attention's own


class Workspace:
    """Buffers shared by all layers, made when first asked for."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """[rows, width], contiguous, with whatever was there before."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < rows * width:
            buffer = self.buffers[name] = self.like.new_empty(rows * width)
        return buffer[: rows * width].view(rows, width)


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
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, q + k + v] -> q, k, v by head; views."""
        q, k, v = slice(self.q), slice(self.q, self.q + self.k), slice(self.q + self.k, None)
        return self.by_head(qkv[:, q]), self.by_head(qkv[:, k]), self.by_head(qkv[:, v])


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward or backward share."""

    rope: tuple[Tensor, Tensor]  # cos and sin, [rows, 1, rotated dimensions / 2] each
    attention: Attention
    work: Workspace
    changed: bool  # whether the adapter may be another than in the pass before


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
    def stacks(self) -> tuple[Stack, Stack, Stack, Stack]:
        return self.qkv, self.o, self.gate_up, self.down

    def by_stack(self, thin: Tensor, tail: int) -> tuple[Tensor, ...]:
        """[rows, ranks] -> every stack's h, views; all but that of q, k, v have `tail` rows."""
        ends = list(itertools.accumulate(stack.rank for stack in self.stacks))
        return (thin[:, : ends[0]], *(thin[:tail, a:b] for a, b in itertools.pairwise(ends)))

    @property
    def keeps_raw(self) -> bool:
        return self.head_norms is not None or self.qkv.gains is not None

    @property
    def learns(self) -> bool:
        return any(stack.rank for stack in self.stacks)

    def forward(self, here: Pass, kept: Kept, x_next: Tensor, rows: Tensor | None = None) -> None:
        """Fills `kept`, whose x is given, and x_next; with `rows` [tail rows] only those, in that order."""
        geometry, work = self.geometry, here.work
        qkv = self.qkv.opened("qkv weight", work.take)
        if here.changed:
            qkv.lay_out_adapter()
        for s in slices(len(kept.x)):
            normed = work.take("normed", s.stop - s.start, self.qkv.in_features)
            self.input_norm.forward(kept.x[s], normed)
            qkv.forward(normed, kept.thin[0][s], kept.qkv[s])
            q_and_k = kept.qkv[s, : geometry.q + geometry.k]
            if self.keeps_raw:
                kept.raw[s] = q_and_k
            if self.head_norms is not None:
                for norm, part in zip(self.head_norms, (slice(geometry.q), slice(geometry.q, None)), strict=True):
                    norm.forward(geometry.by_head(kept.raw[s, part]), geometry.by_head(q_and_k[:, part]))
            rotate_(geometry.by_head(q_and_k), here.rope[0][s], here.rope[1][s])
        q, k, v = geometry.split(kept.qkv)
        kept.extra = here.attention.forward(self.index, q, k, v, geometry.by_head(kept.attended))
        self._tail(here, kept, x_next, rows)

    def _tail(self, here: Pass, kept: Kept, x_next: Tensor, rows: Tensor | None) -> None:
        work = here.work
        o, gate_up, down = self._opened_tail(work)
        if here.changed:
            for stack in (o, gate_up, down):
                stack.lay_out_adapter()
        own_o, own_down = kept.own.chunk(2, dim=1)
        x, attended = (kept.x, kept.attended) if rows is None else (kept.x[rows], kept.attended[rows])
        _, h_o, h_gate_up, h_down = kept.thin
        for s in slices(len(x)):
            o.forward(attended[s], h_o[s], kept.mid[s], x[s], own_o[s])
            normed = work.take("normed", s.stop - s.start, self.gate_up.in_features)
            self.mlp_norm.forward(kept.mid[s], normed)
            gate_up.forward(normed, h_gate_up[s], kept.gate_up[s])
            active = work.take("active", s.stop - s.start, self.geometry.intermediate)
            swiglu(kept.gate_up[s], active)
            down.forward(active, h_down[s], x_next[s], kept.mid[s], own_down[s])

    def _opened_tail(self, work: Workspace) -> tuple[Stack, Stack, Stack]:
        stacks = {"o": self.o, "gate_up": self.gate_up, "down": self.down}
        o, gate_up, down = (stack.opened(f"{name} weight", work.take) for name, stack in stacks.items())
        return o, gate_up, down

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
        o, gate_up, down = self._opened_tail(work)
        grads_o, grads_gate_up, grads_down = StackGradients(o), StackGradients(gate_up), StackGradients(down)
        _, h_o, h_gate_up, h_down = kept.thin
        own_o, own_down = kept.own.chunk(2, dim=1)
        for s in slices(len(dx)):
            count, wide = s.stop - s.start, self.geometry.intermediate
            active, d_gate_up = work.take("active", count, wide), work.take("d_gate_up", count, 2 * wide)
            d_active, d_normed = work.take("d_active", count, wide), work.take("d_normed", count, dx.shape[1])
            dy = grads_down.entering(dx[s], own_down[s], work.take)
            g = down.upstream(dy)
            swiglu_backward(down.through(dy, g, d_active), kept.gate_up[s], active, d_gate_up)
            grads_down.add(active, h_down[s], dy, g)
            normed = work.take("normed", count, dx.shape[1])
            rstd = self.mlp_norm.forward(kept.mid[s], normed)
            dy = grads_gate_up.entering(d_gate_up, kept.gate_up[s], work.take)
            g = gate_up.upstream(dy)
            grads_gate_up.add(normed, h_gate_up[s], dy, g)
            self.mlp_norm.backward(gate_up.through(dy, g, d_normed), kept.mid[s], rstd, dx[s])
            dy = grads_o.entering(dx[s], own_o[s], work.take)
            g = o.upstream(dy)
            grads_o.add(attended[s], h_o[s], dy, g)
            o.through(dy, g, d_attended[s])
        for gradients in (grads_o, grads_gate_up, grads_down):
            gradients.collect(grads)

    def _qkv_backward(
        self, here: Pass, kept: Kept, d_qkv: Tensor, dx: Tensor, grads: dict[int, Tensor], wants_dx: bool
    ) -> None:
        geometry, gradients = self.geometry, StackGradients(self.qkv)
        qkv = self.qkv.opened("qkv weight", here.work.take) if wants_dx else self.qkv
        for s in slices(len(dx)):
            d_q_and_k = d_qkv[s, : geometry.q + geometry.k]
            rotate_(geometry.by_head(d_q_and_k), here.rope[0][s], here.rope[1][s], back=True)
            if self.head_norms is not None:
                for norm, part in zip(self.head_norms, (slice(geometry.q), slice(geometry.q, None)), strict=True):
                    norm.backward_in_place(geometry.by_head(d_q_and_k[:, part]), geometry.by_head(kept.raw[s, part]))
            normed = here.work.take("normed", s.stop - s.start, dx.shape[1])
            rstd = self.input_norm.forward(kept.x[s], normed)
            dy = d_qkv[s]
            if qkv.gains is not None:
                came_out = torch.cat((kept.raw[s], kept.qkv[s, geometry.q + geometry.k :]), 1)
                dy = gradients.entering(dy, came_out, here.work.take)
            g = qkv.upstream(dy)
            gradients.add(normed, kept.thin[0][s], dy, g)
            if wants_dx:
                d_normed = here.work.take("d_normed", s.stop - s.start, dx.shape[1])
                self.input_norm.backward(qkv.through(dy, g, d_normed), kept.x[s], rstd, dx[s])
        gradients.collect(grads)


def slices(rows: int) -> Iterator[slice]:
    """Cuts [0, rows) evenly into slices of at most SLICE."""
    count = -(-rows // SLICE)
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)
