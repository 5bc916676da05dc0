"""Attention of one step's tokens over the cache, in parts that are merged by their log-sum-exp.

The flat rows of a step are first those of the decoding sequences, one each and one for every guessed token, then the
spans: runs of prompt tokens of one sequence. A row looks at
    its own end      decoding rows: all slots in one batched attention; a span: itself and what precedes it in its store
    shared nodes     every node on its path, one attention a node for all rows below it
Softmax over the union of keys is the mean of the parts' outputs weighted by exp(log-sum-exp) (Flash attention's
identity, Dao et al. 2022, arXiv:2205.14135), so nothing is copied or padded but the slots' unused room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tunesmith.cpu import flash
from tunesmith.cpu.attention import Piece, Pieces, Places, attend, cache, can_attend
from tunesmith.cpu.sight import ALWAYS, Seen, Sight, reach_of
from tunesmith.engine.cache import KeyValues, Node, Slots
from tunesmith.engine.repeats import Memory

READ_ALONE = 4096  # tokens of a node times rows below it, up to which reading them over again costs less than a merge

Part = tuple[Tensor, Tensor]  # out [.., queries, dim], log-sum-exp [.., queries] in float32


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) of a step: tokens of one sequence, written to `store` from `offset` on."""

    start: int
    stop: int
    store: KeyValues
    offset: int


@dataclass(frozen=True, slots=True)
class Below:
    """A node and the rows of the step that lie below it."""

    node: Node
    rows: Tensor  # [rows] ascending


@dataclass
class CacheContext:
    """The attention of one step (implements tree.body.AttentionContext)."""

    positions: Tensor  # [tokens] of every row of the step
    slots: Slots
    slot_index: Tensor  # [decoding] the slot of each decoding row
    offsets: Tensor  # [decoding] where in the slot it is written; it sees what lies up to there
    turns: Tensor  # [decoding] how many rows of the same slot come before it
    spans: Sequence[Span]
    below: Sequence[Below]
    _masks: dict[tuple[object, int | None], Tensor | None] = field(default_factory=dict)
    _sights: dict[tuple[object, int | None], Sight] = field(default_factory=dict)
    _pieces: dict[int | None, Pieces] = field(default_factory=dict)
    _places: dict[int, Places] = field(default_factory=dict)  # by the first of the rows that are cached there

    def __post_init__(self) -> None:
        decoding = len(self.slot_index)
        self.decoding = decoding
        # Nodes that few decoding rows see are read with what is a row's own, where there is a kernel for it.
        self.own_nodes: list[tuple[Node, list[int]]] = []
        self.shared_nodes: list[Below] = []
        for below in self.below:
            rows = [row for row in below.rows.tolist() if row < decoding]
            if not (len(rows) == 1 or 0 < len(rows) * (below.node.end - below.node.start) <= READ_ALONE):
                self.shared_nodes.append(below)
                continue
            self.own_nodes.append((below.node, rows))
            if len(rows) < len(below.rows):
                self.shared_nodes.append(Below(below.node, below.rows[len(rows) :]))
        if decoding:
            self.reach = int(self.offsets.max()) + 1
            self.count, self.width = int(self.slot_index.max()) + 1, int(self.turns.max()) + 1  # slots, rows in each
            self.places = self.slot_index * self.width + self.turns
            self.dense = bool((self.places == torch.arange(decoding, device=self.places.device)).all())
            self.dense &= decoding == self.count * self.width

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See AttentionContext. Writes the rows' keys and values to the cache first."""
        alone, tiles = (softcap is None and can(query, value) for can in (can_attend, flash.can_see))
        self._write(layer, key[0], value[0], alone)
        _, heads, tokens, _ = query.shape
        dim = value.shape[-1]
        out = query.new_empty(tokens, heads, dim)
        lse = torch.empty(tokens, heads, dtype=torch.float32, device=query.device)
        if self.decoding:
            rows = query[0, :, : self.decoding]
            if alone:
                self._attend_alone(layer, rows, scaling, sliding_window, out, lse)
            else:
                out[: self.decoding], lse[: self.decoding] = self._decode(layer, rows, scaling, sliding_window, softcap)
        for span in self.spans:
            here = slice(span.start, span.stop)
            rows = query[:, :, here]
            if tiles:
                self._span_by_tiles(layer, span, rows, scaling, sliding_window, out[here], lse[here])
            else:
                part = self._span(layer, span, rows, scaling, sliding_window, softcap)
                out[here], lse[here] = part[0][0].transpose(0, 1), part[1][0].T
        for below in self.shared_nodes if alone else self.below:
            if tiles:
                self._merge_by_tiles(layer, below, query, out, lse, scaling, sliding_window)
            else:
                self._merge(layer, below, query, out, lse, scaling, sliding_window, softcap)
        return out[None]

    def _write(self, layer: int, key: Tensor, value: Tensor, alone: bool) -> None:
        """key, value [kv_heads, tokens, dim] into the slots and stores."""
        kv = self.slots.kv
        if self.decoding and alone:
            rows = slice(self.decoding)
            if 0 not in self._places:
                self._places[0] = Places(self.slot_index.tolist(), self.offsets.tolist())
            cache(key[:, rows], value[:, rows], kv.keys[layer], kv.values[layer], self._places[0])
        elif self.decoding:
            where = (self.slot_index, slice(None), self.offsets)
            kv.keys[layer][where] = key[:, : self.decoding].transpose(0, 1)
            kv.values[layer][where] = value[:, : self.decoding].transpose(0, 1)
        for span in self.spans:
            rows, into = slice(span.start, span.stop), range(span.offset, span.offset + span.stop - span.start)
            keys, values = span.store.keys[layer], span.store.values[layer]
            if alone:
                if span.start not in self._places:
                    self._places[span.start] = Places([0] * len(into), into)
                cache(key[:, rows], value[:, rows], keys[None], values[None], self._places[span.start])
            else:
                keys[:, into.start : into.stop], values[:, into.start : into.stop] = key[:, rows], value[:, rows]

    def _attend_alone(
        self, layer: int, query: Tensor, scaling: float, window: int | None, out: Tensor, lse: Tensor
    ) -> None:
        """query [heads, decoding, dim]; fills the first rows of out and lse."""
        stores = [self.slots.kv, *(node.kv for node, _ in self.own_nodes)]
        keys, values = [kv.keys[layer] for kv in stores], [kv.values[layer] for kv in stores]
        if window not in self._pieces:
            self._pieces[window] = self._look_alone(window)
        attend(query, keys, values, self._pieces[window], scaling, out[: self.decoding], lse[: self.decoding])

    def memory(self) -> Memory:
        """Of the cache, what each layer's rows read and write."""
        written = [span.store for span in self.spans if span.store.memory is not None]  # the others are slots
        nodes = {id(kv): kv for kv in (*written, *(each.node.kv for each in self.below))}
        stores = (self.slots.kv, *nodes.values())
        return Memory.of(list(zip(*(side for kv in stores for side in (kv.keys, kv.values)), strict=True)))

    def _look_alone(self, window: int | None) -> Pieces:
        """What each decoding row looks at: its slot up to itself, then nodes that it reads alone."""
        rows: list[list[Piece]] = []
        for slot, offset in zip(self.slot_index.tolist(), self.offsets.tolist(), strict=True):
            rows.append([Piece(0, 0 if window is None else max(0, offset + 1 - window), offset + 1, slot)])
        for store, (node, readers) in enumerate(self.own_nodes, 1):
            for row in readers:
                start = 0 if window is None else max(0, int(self.positions[row]) + 1 - window - node.start)
                rows[row].append(Piece(store, start, node.end - node.start))
        return Pieces(rows)

    def _decode(self, layer: int, query: Tensor, scaling: float, window: int | None, softcap: float | None) -> Part:
        """query [heads, decoding, dim] -> out [decoding, heads, dim], lse [decoding, heads]."""
        keys = self.slots.kv.keys[layer][: self.count, :, : self.reach]
        values = self.slots.kv.values[layer][: self.count, :, : self.reach]
        count, width, kv_heads = self.count, self.width, keys.shape[1]
        rows = query.transpose(0, 1)
        if not self.dense:
            rows = rows.new_zeros(count * width, *rows.shape[1:]).index_copy_(0, self.places, rows)
        # A slot's rows and a key-value head's query heads are one product: [slots, kv_heads, group * width, dim].
        grouped = rows.reshape(count, width, kv_heads, -1, query.shape[-1]).permute(0, 2, 3, 1, 4)
        group = grouped.shape[2]
        grouped = grouped.reshape(count, kv_heads, group * width, -1)
        mask = self._slot_mask(window, group, query.dtype)
        out, lse = attend_part(grouped, keys, values, mask, scaling, softcap)
        out = (
            out.reshape(count, kv_heads, group, width, -1).permute(0, 3, 1, 2, 4).reshape(count * width, len(query), -1)
        )
        lse = lse.reshape(count, kv_heads, group, width).permute(0, 3, 1, 2).reshape(count * width, -1)
        return (out, lse) if self.dense else (out[self.places], lse[self.places])

    def _span(
        self, layer: int, span: Span, query: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Part:
        """query [1, heads, rows, dim]; its own store up to and with itself."""
        stop = span.offset + span.stop - span.start
        keys, values = span.store.keys[layer][None, :, :stop], span.store.values[layer][None, :, :stop]
        return attend_part(query, keys, values, self._span_mask(span, window, query.dtype), scaling, softcap)

    def _span_by_tiles(
        self, layer: int, span: Span, query: Tensor, scaling: float, window: int | None, out: Tensor, lse: Tensor
    ) -> None:
        """The same, written to out [rows, heads, dim] and lse [rows, heads]."""
        stop = span.offset + span.stop - span.start
        if (span.start, window) not in self._sights:
            keys = np.arange(stop)
            rows, ends = keys[span.offset :], np.full(stop, ALWAYS)
            self._sights[span.start, window] = Sight(Seen(rows, rows, keys, ends, reach_of(keys, window)))
        keys, values = (side[layer][:, :stop].transpose(0, 1) for side in (span.store.keys, span.store.values))
        flash.forward(query[0].transpose(0, 1), keys, values, self._sights[span.start, window], scaling, out, lse)

    def _merge_by_tiles(
        self, layer: int, below: Below, query: Tensor, out: Tensor, lse: Tensor, scaling: float, window: int | None
    ) -> None:
        """The same as `_merge`, without a part of its own."""
        node, rows = below.node, below.rows
        if (node, window) not in self._sights:
            places, keys = self.positions[rows].numpy(), np.arange(node.start, node.end)
            begins, ends = np.zeros_like(keys), np.full(len(keys), ALWAYS)
            self._sights[node, window] = Sight(Seen(places, places, begins, ends, reach_of(keys, window)))
        keys, values = (side[layer].transpose(0, 1) for side in (node.kv.keys, node.kv.values))
        first, last = int(rows[0]), int(rows[-1]) + 1
        side_by_side = last - first == len(rows)
        where = slice(first, last) if side_by_side else rows
        queries, sums, logs = query[0].transpose(0, 1)[where], out[where], lse[where]
        flash.forward(queries, keys, values, self._sights[node, window], scaling, sums, logs, goes_on=True)
        if not side_by_side:
            out[rows], lse[rows] = sums, logs

    def _merge(
        self,
        layer: int,
        below: Below,
        query: Tensor,
        out: Tensor,
        lse: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        """Add a node's part to the rows below it. out [tokens, heads, dim] and lse [tokens, heads] in place."""
        node, rows = below.node, below.rows
        if window is not None:  # rows too far away to see any of the node are left out: they have nothing to add
            rows = rows[self.positions[rows] - (node.end - 1) < window]
            if not len(rows):
                return
        keys, values = node.kv.keys[layer][None], node.kv.values[layer][None]
        mask = self._node_mask(node, rows, window, query.dtype)
        kv_heads, count = keys.shape[1], len(rows)
        # All rows' heads that share a key-value head are queries of one attention: [1, kv_heads, group * rows, dim].
        queries = query[0].index_select(1, rows).reshape(1, kv_heads, -1, query.shape[-1])
        if mask is not None:
            mask = mask.repeat(1, 1, queries.shape[2] // count, 1)
        part, part_lse = attend_part(queries, keys, values, mask, scaling, softcap)
        part = part.reshape(-1, count, values.shape[-1]).transpose(0, 1)
        part_lse = part_lse.reshape(-1, count).T
        before = lse[rows]
        merged = torch.logaddexp(before, part_lse)
        lse[rows] = merged
        weighted = out[rows] * (before - merged).exp()[..., None] + part * (part_lse - merged).exp()[..., None]
        out[rows] = weighted.to(out.dtype)

    def _slot_mask(self, window: int | None, group: int, dtype: torch.dtype) -> Tensor | None:
        """[slots, 1, group * width, reach]: 0 where a slot's row sees the token, -inf elsewhere."""
        if ("slots", window) not in self._masks:
            last = self.offsets
            if not self.dense:
                last = last.new_zeros(self.count * self.width).index_copy_(0, self.places, last)
            last = last.reshape(self.count, self.width, 1)
            offsets = torch.arange(self.reach, device=last.device)
            seen = offsets <= last
            if window is not None:
                seen &= offsets > last - window
            mask = None if bool(seen.all()) else _additive(seen, dtype).repeat(1, group, 1)[:, None]
            self._masks["slots", window] = mask
        return self._masks["slots", window]

    def _span_mask(self, span: Span, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[1, 1, rows, keys]: causal within the store the span is written to."""
        if (span.start, window) not in self._masks:
            device = self.positions.device
            stop = span.offset + span.stop - span.start
            own = torch.arange(span.offset, stop, device=device)[:, None]
            seen = torch.arange(stop, device=device) <= own
            if window is not None:
                seen &= torch.arange(stop, device=device) > own - window
            self._masks[span.start, window] = _additive(seen, dtype)[None, None]
        return self._masks[span.start, window]

    def _node_mask(self, node: Node, rows: Tensor, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[1, 1, rows, keys] where a window cuts the node, None where all of it is seen by all rows."""
        if window is None:
            return None
        if (node, window) not in self._masks:
            places = torch.arange(node.start, node.end, device=rows.device)
            seen = self.positions[rows][:, None] - places < window
            self._masks[node, window] = None if bool(seen.all()) else _additive(seen, dtype)[None, None]
        return self._masks[node, window]


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Part:
    """query [batch, heads, queries, dim], key and value [batch, kv_heads, keys, dim], mask broadcastable and additive.

    Every query must see at least one key. Returns out [batch, heads, queries, dim] and its log-sum-exp.
    """
    if softcap is None and query.device.type == "cpu" and value.shape[-1] == query.shape[-1]:
        if mask is not None:
            mask = mask.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scaling
        )
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, queries, dim)
    scores = torch.einsum("bkgqd,bksd->bkgqs", grouped, key).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask[:, :, None]
    lse = torch.logsumexp(scores, -1)
    out = torch.einsum("bkgqs,bksd->bkgqd", (scores - lse[..., None]).exp().to(value.dtype), value)
    return out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """True -> 0, False -> -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)
