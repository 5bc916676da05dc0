"""The model's body as the engine runs it: any decoder through transformers, and the common kind with packed weights.

Llama, Mistral, Qwen and their like are one recipe: norm, q/k/v, rotary, attention, o, norm, gate/up, SwiGLU, down. For
them q/k/v and gate/up are each one product over weights laid out once (tunesmith.cpu), and nothing is computed that
generation doesn't need. Whether a model really is of this kind is not believed but tried: both bodies must agree on a
few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.engine.attention import CacheContext, Span
from tunesmith.engine.cache import KvSpec, Slots
from tunesmith.engine.packing import Packing, pack_numbers
from tunesmith.engine.projection import AdapterTables, Mix, Projection, Segment
from tunesmith.engine.repeats import Memory, Repeats
from tunesmith.models.embedding import LoraEmbedding
from tunesmith.models.fused_ops import norm_of, rotate_, swiglu
from tunesmith.models.lora import LoraModel
from tunesmith.tree.body import LayerAttention, Listener, run_body

PACKABLE = {"llama", "mistral", "qwen2", "qwen3"}
TRIED = 5  # tokens on which the bodies are compared
MERGE_AFTER = 2048  # rows that one adapter must have had to itself before it is put into the weights


class Body(Protocol):
    """input_ids, position_ids [tokens] -> hidden [tokens, hidden]; `segments` says which rows use which adapter."""

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, context: CacheContext, segments: tuple[Segment, ...]
    ) -> Tensor: ...


class PlainBody:
    """Any decoder, as transformers defines it."""

    def __init__(self, lora: LoraModel) -> None:
        self._lora = lora

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, context: CacheContext, segments: tuple[Segment, ...]
    ) -> Tensor:
        self._lora.routing.segments = segments
        try:
            return run_body(self._lora.model, input_ids, position_ids, context)
        finally:
            self._lora.routing.segments = ()


class PackedLayer:
    """One decoder layer of the Llama kind."""

    def __init__(self, layer: Any, index: int, head_dim: int, packing: Packing, calls: LayerAttention) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.head_dim = index, head_dim
        self.calls = asdict(calls)
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        heads = [_out_features(part) // head_dim for part in parts]
        self.heads, self.kv_heads = heads[0], heads[1]
        self.qkv = Projection(*parts, packing=packing)
        self.output = Projection(attention.o_proj, packing=packing)
        self.gate_up = Projection(mlp.gate_proj, mlp.up_proj, packing=packing)
        self.down = Projection(mlp.down_proj, packing=packing)
        self.projections = (self.qkv, self.output, self.gate_up, self.down)
        self.width = _out_features(mlp.gate_proj)
        self.before_attention, self.before_mlp = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        own: list[Any] = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.head_norms = None if own[0] is None else (norm_of(own[0]), norm_of(own[1]))

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, context: CacheContext, mix: Mix) -> None:
        """x [tokens, hidden], changed in place; cos, sin [tokens, 1, dim / 2]."""
        tokens, split = x.shape[0], self.heads + self.kv_heads
        normed = torch.empty_like(x)
        self.before_attention.forward(x, normed)
        qkv = self.qkv(normed, mix).view(tokens, -1, self.head_dim)
        if self.head_norms is not None:
            for norm, part in zip(self.head_norms, (qkv[:, : self.heads], qkv[:, self.heads : split]), strict=True):
                norm.forward(part, part)
        rotate_(qkv[:, :split], cos, sin)
        by_head = qkv.transpose(0, 1)[None]
        out = context.attend(
            self.index,
            by_head[:, : self.heads],
            by_head[:, self.heads : split],
            by_head[:, split:],
            **self.calls,
        )
        self.output(out.reshape(tokens, -1), mix, x)
        self.before_mlp.forward(x, normed)
        active = x.new_empty(tokens, self.width)
        swiglu(self.gate_up(normed, mix), active)
        self.down(active, mix, x)

    def memory(self, mix: Mix) -> list[Tensor]:
        """What of its own it reads."""
        norms = [self.before_attention, self.before_mlp, *(self.head_norms or ())]
        return [norm.weight for norm in norms] + [each for part in self.projections for each in part.memory(mix)]


class PackedBody:
    """A decoder of the Llama kind with packed weights. They are copies: the base must not change afterwards.

    `adapter_limit` is the memory, in bytes, that adapters may take; up to half of it goes to a copy of the weights with
    one of them in it, where it is enough for that. No adapter is merged into a quantised base.
    """

    def __init__(
        self, model: PreTrainedModel, packing: Packing, adapter_limit: int, calls: Mapping[int, LayerAttention]
    ) -> None:
        base: Any = model.base_model
        self._embed, self._rotary, self._norm = base.embed_tokens, base.rotary_emb, norm_of(base.norm)
        head_dim = base.layers[0].self_attn.head_dim
        self._layers = [
            PackedLayer(layer, index, head_dim, packing, calls[index]) for index, layer in enumerate(base.layers)
        ]
        projections = [each for layer in self._layers for each in layer.projections]
        merged = sum(each.bytes for each in projections)
        self._merges = packing is pack_numbers and merged <= adapter_limit // 2
        self.tables = AdapterTables(projections, adapter_limit - merged if self._merges else adapter_limit)
        self._repeats = Repeats()
        self._alone: tuple[str | None, int] = (None, 0)  # the adapter that had the last steps to itself; their rows
        self._last: tuple[Any, Mix] = (None, Mix.of((), {}))  # what the latest mix was made from, and it
        self._own: tuple[Any, Memory, list[int]] = (None, Memory.of(()), [])  # when layers' memory was looked at

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, context: CacheContext, segments: tuple[Segment, ...]
    ) -> Tensor:
        embed = self._embed
        x = embed.look_up(input_ids, segments) if isinstance(embed, LoraEmbedding) else embed(input_ids)
        cos, sin = self._rotary(x[None], position_ids[None])
        half = cos.shape[-1] // 2  # the second half repeats the first
        cos, sin = cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()
        whole = segments[0][0] if segments and segments[0][1:] == (0, len(input_ids)) else None
        whole = whole if whole in self.tables.places else None
        self._merge_where_it_pays(whole, len(input_ids))
        mix = self._mix(segments, whole)

        def call(layer: int, x: Tensor) -> None:
            self._layers[layer](x, cos, sin, context, mix)

        memory, forms = self._memory(mix)
        ways = [tuple(part.way(mix) for part in layer.projections) for layer in self._layers]
        self._repeats.run(call, x, list(zip(forms, ways, strict=True)), memory.beside(context.memory()))
        self._norm.forward(x, x)
        return x

    def _memory(self, mix: Mix) -> tuple[Memory, list[int]]:
        """What each layer has to itself besides the cache, and numbers that are the same for layers of one form."""
        when = self.tables.version, mix.whole == self.tables.merged
        if when != self._own[0]:
            found = [layer.memory(mix) for layer in self._layers]
            forms = [(layer.calls, [t.shape for t in own]) for layer, own in zip(self._layers, found, strict=True)]
            self._own = when, Memory.of(found), [forms.index(form) for form in forms]
        return self._own[1:]

    def _merge_where_it_pays(self, whole: str | None, rows: int) -> None:
        """An adapter that keeps the engine to itself gets weights of its own; making them costs some hundred rows."""
        name, before = self._alone
        self._alone = (whole, before + rows if whole == name else rows)
        if whole is not None and self._merges and self._alone[1] >= MERGE_AFTER and self.tables.merged != whole:
            self.tables.merge(whole)

    def _mix(self, segments: tuple[Segment, ...], whole: str | None) -> Mix:
        places = tuple(self.tables.places.get(name) for name, _, _ in segments)
        key = (segments, places, whole)
        if key != self._last[0]:
            self._last = key, Mix.of(segments, self.tables.places, whole)
        return self._last[1]


def packed_body(lora: LoraModel, spec: KvSpec, packing: Packing, adapter_limit: int) -> PackedBody | None:
    """The fast body where the model is of the kind it computes, proved on a few tokens; None where it is not."""
    model = lora.model
    weight = model.get_input_embeddings().weight
    if model.config.model_type not in PACKABLE or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    with torch.no_grad():
        ids, heard = torch.arange(TRIED), Listener(_among_themselves(spec))
        expected = run_body(model, ids, ids, heard)
        body = PackedBody(model, packing, adapter_limit, heard.layers)
        found = body(ids, ids, _among_themselves(spec), ())
    same = torch.allclose(expected, found, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    return body if same else None


def _among_themselves(spec: KvSpec) -> CacheContext:
    """A few tokens that see nothing but each other."""
    ids, none = torch.arange(TRIED), torch.empty(0, dtype=torch.long)
    return CacheContext(ids, Slots(spec), none, none, none, [Span(0, TRIED, spec.empty(TRIED), 0)], [])


def _out_features(linear: Any) -> int:
    return int(linear.out_features)
