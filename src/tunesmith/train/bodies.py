"""How a model's body is run: fused where it has that shape and the numbers agree, else through its own modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tunesmith.cpu.products import Panels
from tunesmith.models.embedding import LoraEmbedding
from tunesmith.models.fused import FusedDecoder, fuse
from tunesmith.models.lora import LoraModel
from tunesmith.models.memory import trim_heap
from tunesmith.models.packed import can_pack, page_out
from tunesmith.train.forward import Body, ModuleBody, T
from tunesmith.tree.attention import PrefixCache, TreeContext, tree_backward, tree_forward
from tunesmith.tree.body import LayerAttention, Listener, run_body
from tunesmith.tree.heads import Head, head_of
from tunesmith.tree.layout import TokenTree, build_tree
from tunesmith.types import TokenizedExample


def make_body(model: PreTrainedModel, lora: LoraModel | None = None, adapter: str | None = None) -> Body:
    """The fastest body that computes what the (prepared) model computes, with `adapter` on."""
    parameters = list(model.parameters()) if lora is None else [p for _, p in lora.parameters(str(adapter))]
    plain = ModuleBody(model, parameters)
    if lora is None or adapter is None or not _is_plain(lora, adapter):
        return plain
    decoder = fuse(model, adapter)
    if decoder is None:
        return plain
    lora.use(adapter)
    tree = _trial(model)
    seen = Listener(TreeContext(tree))
    ids, positions = torch.as_tensor(tree.input_ids), torch.as_tensor(tree.position_ids)
    with torch.no_grad():
        expected = run_body(model, ids, positions, seen)
    if seen.layers.keys() != set(range(len(decoder.layers))):
        return plain
    fused = FusedBody(model, decoder, seen.layers, parameters)
    with torch.no_grad():
        actual, _ = fused(tree, torch.arange(tree.tokens))
    return fused if torch.allclose(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())) else plain


def _is_plain(lora: LoraModel, adapter: str) -> bool:
    """Without dropout, which is what the fused decoder computes; the ends are not its business."""
    found = [layer.adapters[adapter] for layer in lora.layers.values() if adapter in layer.adapters]
    return not any(weights.dropout for weights in found)


def _trial(model: PreTrainedModel) -> TokenTree:
    """Two branches behind a prefix."""
    size = min(64, model.config.get_text_config().vocab_size)
    rows = [np.arange(9) % size, np.array([0, 1, 2, 7, 6, 5, 4, 3]) % size]
    return build_tree([TokenizedExample("", ids.astype(np.int32), np.zeros(len(ids), np.float32)) for ids in rows])


class FusedBody:
    """A FusedDecoder as a Body: one node of the autograd graph."""

    sharded = False

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: FusedDecoder,
        layers: dict[int, LayerAttention],
        parameters: list[nn.Parameter],
    ) -> None:
        self.model, self.decoder, self.layers, self.parameters = model, decoder, layers, parameters
        self.device = model.device
        self._packed_head: Head | None = None

    @property
    def head(self) -> Head:
        return self._packed_head or head_of(self.model)

    def compute(self, work: Callable[[], T]) -> T:
        return work()

    def rest(self) -> None:
        self.decoder.slabs.free.clear()
        trim_heap()

    def pack(self) -> None:
        """Take another `packed_bytes` for copies of the frozen weights that make products faster."""
        self.decoder.pack()
        head = self.head
        if can_pack(head.weight) and not head.weight.requires_grad:
            panels = Panels.of(head.weight.detach())
            self._packed_head = replace(head, panels=panels)
            if self._embedding_is(head.weight):  # then nobody reads the original, and it takes no memory
                self.decoder.embedding.panels = panels
            page_out(head.weight)

    def unpack(self) -> None:
        self.decoder.unpack()
        self._packed_head = None
        if isinstance(self.decoder.embedding, LoraEmbedding):
            self.decoder.embedding.panels = None
        self.rest()

    def _embedding_is(self, weight: Tensor) -> bool:
        """Whether a token's embedding is its row of this weight and nothing more."""
        embedding = self.decoder.embedding
        same = isinstance(embedding, LoraEmbedding) and type(embedding.base) is nn.Embedding
        return same and embedding.weight.data_ptr() == weight.data_ptr()

    @property
    def packed_bytes(self) -> int:
        return self.decoder.packed_bytes + self.head.weight.numel() * self.head.weight.element_size()

    @property
    def dequantised_bytes(self) -> int:
        """What a thread holds of a quantised base as numbers while it computes."""
        return self.decoder.dequantised_bytes

    def __call__(
        self, tree: TokenTree, rows: Tensor, prefix: PrefixCache | None = None, *, record: bool = False
    ) -> tuple[Tensor, PrefixCache | None]:
        attention = _TreeAttention(TreeContext(tree, prefix=prefix, record=record), self.layers)
        embedded = self.decoder.embedding(torch.as_tensor(tree.input_ids))
        inputs = [embedded, *self.parameters, *([] if prefix is None else prefix.tensors())]
        # autograd.Function does not say whether gradients are wanted: inside it they are always off.
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        hidden, *recorded = _FusedPass.apply(self.decoder, tree, rows, attention, keep, *inputs)  # type: ignore[misc]
        if not record:
            return hidden, None
        layers = len(self.layers)
        return hidden, PrefixCache(dict(enumerate(recorded[:layers])), dict(enumerate(recorded[layers:])))


@dataclass
class _TreeAttention:
    """Attention over the tree, behind the fused decoder's Attention."""

    context: TreeContext
    layers: dict[int, LayerAttention]
    upstream: dict[int, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)  # of recorded keys, values
    prefix_grads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        settings, recorded = self.layers[layer], self.context.recorded
        query, key, value = self._inputs(layer, q, k, v)
        if recorded is not None:
            recorded.keys[layer], recorded.values[layer] = _heads_first(k).clone(), _heads_first(v).clone()
        view = self.context.view(settings.sliding_window)
        return tree_forward(query, key, value, out[None], view, settings.scaling, settings.softcap)

    def backward(
        self,
        layer: int,
        forward: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        d_out: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        settings, (q, k, v, out, lse) = self.layers[layer], forward
        query, key, value = self._inputs(layer, q, k, v)
        dq, dk, dv = (_heads_first(g) for g in grads)
        into = (dq, dk, dv)
        if self.context.prefix is not None:
            into = (dq, torch.empty_like(key), torch.empty_like(value))
        view = self.context.view(settings.sliding_window)
        seen = (query, key, value, out[None], lse)
        tree_backward(d_out[None], seen, into, view, settings.scaling, settings.softcap)
        if self.context.prefix is not None:
            length = self.context.tree.prefix
            self.prefix_grads[layer] = (into[1][:, :, :length], into[2][:, :, :length])
            dk.copy_(into[1][:, :, length:])
            dv.copy_(into[2][:, :, length:])
        for grad, more in zip((dk, dv), self.upstream.get(layer, (None, None)), strict=True):
            if more is not None:
                grad += more

    def _inputs(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (_heads_first(t) for t in (q, k, v))
        if self.context.prefix is None:
            return query, key, value
        before = self.context.prefix
        key = torch.cat((before.keys[layer].detach(), key), dim=2)
        return query, key, torch.cat((before.values[layer].detach(), value), dim=2)


def _heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, dim] -> [1, heads, tokens, dim], a view."""
    return x.transpose(0, 1)[None]


class _FusedPass(torch.autograd.Function):
    """inputs: embeddings, adapter's parameters, the prefix's keys and values; outputs: hidden, then recorded ones."""

    @staticmethod
    def forward(
        ctx: Any,
        decoder: FusedDecoder,
        tree: TokenTree,
        rows: Tensor,
        attention: _TreeAttention,
        keep: bool,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        positions = torch.as_tensor(tree.position_ids)
        behind = attention.context.prefix is not None  # whose pass had the adapter as it is
        hidden, held = decoder.forward(inputs[0], positions, attention, rows, keep=keep, changed=not behind)
        ctx.set_materialize_grads(False)
        ctx.decoder, ctx.held, ctx.attention, ctx.inputs = decoder, held, attention, inputs
        # Not kept: what ctx holds of its own outputs holds ctx, and would never be freed.
        recorded, attention.context.recorded = attention.context.recorded, None
        return hidden, *([] if recorded is None else recorded.tensors())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        attention, held, inputs = ctx.attention, ctx.held, ctx.inputs
        assert held is not None, "a fused pass has one backward"
        recorded, layers = upstream[1:], len(ctx.decoder.layers)
        if recorded:
            attention.upstream = dict(enumerate(zip(recorded[:layers], recorded[layers:], strict=True)))
        grads, embedded = ctx.decoder.backward(held, upstream[0], wants_x=inputs[0].requires_grad)
        ctx.held = None
        prefix = [attention.prefix_grads.get(layer, (None, None)) for layer in range(layers)]
        by_prefix = [pair[side] for side in (0, 1) for pair in prefix] if attention.context.prefix is not None else []
        own = [grads.get(id(parameter)) for parameter in inputs[1 : len(inputs) - len(by_prefix)]]
        return None, None, None, None, None, embedded, *own, *by_prefix
