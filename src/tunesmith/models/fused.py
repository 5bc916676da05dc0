"""A Llama-like decoder with its forward and backward written out: what a CPU needs to spend its time on products.

It covers whatever has that shape: Llama, SmolLM, Qwen2 (biases), Qwen3 (norms on q and k), Mistral (window), Phi-3
(linears stacked already). A model is told by its structure here and by its numbers in train/bodies.py, never by its
name; every other goes through its own modules.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.models.embedding import LoraEmbedding
from tunesmith.models.fused_layer import Attention, FusedLayer, Geometry, Kept, Pass, Workspace
from tunesmith.models.fused_ops import norm_of
from tunesmith.models.lora import LoraLinear
from tunesmith.models.quantised import QuantisedLinear
from tunesmith.models.stacked import Stack

ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
MLP_PARTS = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
BODY_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
ROOM = 128  # rows that memory between forward and backward is a multiple of


@dataclass
class Held:
    """A forward pass on its way to its backward."""

    kept: list[Kept]  # of the layers from the decoder's `first` on
    last: Tensor  # [rows, hidden] before the final norm
    rows: Tensor
    context: Pass
    slabs: list[Tensor]


class Slabs:
    """Memory for so many layers' `Kept`, given back by the backward: its pages are touched once a run.

    There is room for more rows than were asked for, so that a few more of them need no new memory: what nobody has
    written to takes none.
    """

    def __init__(self, widths: Sequence[int], layers: int, like: Tensor) -> None:
        self.widths, self.layers, self.like = widths, layers, like
        self.free: list[list[Tensor]] = []
        self._lock = threading.Lock()

    def take(self, rows: int) -> list[Tensor]:
        """For each width [layers, at least `rows`, width]."""
        with self._lock:
            fitting = [slabs for slabs in self.free if slabs[0].shape[1] >= rows]
            if fitting:
                chosen = min(fitting, key=lambda slabs: slabs[0].shape[1])
                self.free = [slabs for slabs in self.free if slabs is not chosen]
                return chosen
            self.free.clear()
        room = -(-rows // ROOM) * ROOM
        return [self.like.new_empty(self.layers, room, width) for width in self.widths]

    def give(self, slabs: list[Tensor]) -> None:
        with self._lock:
            self.free.append(slabs)


class FusedDecoder:
    """The body of a model whose every linear is a LoraLinear, with one adapter (LoRA or DoRA) over it.

    Float32 or float64, CPU.

    first  the lowest layer that a gradient has to reach; those below it keep nothing for the backward.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[FusedLayer], first: int) -> None:
        body: Any = model.base_model
        self.model, self.layers, self.first = model, list(layers), first
        self.embedding, self.rotary = body.embed_tokens, body.rotary_emb
        self.norm = norm_of(body.norm)
        self._own = threading.local()
        like = body.norm.weight.detach()
        any_layer = self.layers[0]
        self.geometry, self.hidden = any_layer.geometry, any_layer.qkv.in_features
        raw = self.geometry.q + self.geometry.k if any(layer.keeps_raw for layer in self.layers) else 0
        widths = (
            self.hidden,
            raw,
            any_layer.qkv.out_features,
            self.geometry.q,
            self.hidden,
            2 * self.geometry.intermediate,
            max(sum(stack.rank for stack in layer.stacks) for layer in self.layers),
            2 * self.hidden if any(s.gains is not None for layer in self.layers for s in (layer.o, layer.down)) else 0,
        )
        self.slabs, self.one_layer = Slabs(widths, len(self.layers) - first, like), Slabs(widths, 1, like)

    @property
    def work(self) -> Workspace:
        """This thread's own."""
        if not hasattr(self._own, "work"):
            self._own.work = Workspace(self.slabs.like)
        return self._own.work

    def pack(self) -> None:
        """Copy the frozen weights into layouts for fast products; the caller knows whether there is memory for it."""
        for layer in self.layers:
            for stack in layer.stacks:
                stack.pack()

    def unpack(self) -> None:
        """Give the copies back: passes become slower."""
        for layer in self.layers:
            for stack in layer.stacks:
                stack.unpack()

    @property
    def packed_bytes(self) -> int:
        """What `pack` costs."""
        numbers = sum(s.in_features * s.out_features for layer in self.layers for s in layer.stacks)
        return numbers * self.slabs.like.element_size()

    @property
    def dequantised_bytes(self) -> int:
        """What a thread holds of quantised weights as numbers: one layer's, and the largest matrix on its way into
        panels. 0 where they are numbers anyway."""
        layers = [[linear for stack in layer.stacks for linear in stack.quantised] for layer in self.layers]
        sizes = [[linear.out_features * linear.in_features for linear in linears] for linears in layers]
        return max(sum(each) + max(each, default=0) for each in sizes) * self.slabs.like.element_size()

    @property
    def bytes_per_token(self) -> int:
        """What a token keeps in memory between forward and backward."""
        return self.slabs.layers * sum(self.slabs.widths) * self.slabs.like.element_size()

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, attention: Attention, rows: Tensor, *, keep: bool, changed: bool = True
    ) -> tuple[Tensor, Held | None]:
        """Normalised hidden states of `rows` [rows, hidden]; with `keep` also what `backward` wants.

        x [tokens, hidden] are the tokens' embeddings, overwritten unless `keep` and `first` is 0. `changed`: whether
        the adapter may be another than in the pass before.
        """
        tokens, first = len(x), self.first if keep else len(self.layers)
        context = Pass(self._rope(x, position_ids), attention, self.work, changed)
        passing = self.one_layer.take(tokens) if first else []
        slabs, kept = self.slabs.take(tokens) if keep else [], list[Kept]()
        last = x.new_empty(len(rows), self.hidden)
        for layer in self.layers:
            final, keeps = layer is self.layers[-1], layer.index >= first
            memory, slot = (slabs, layer.index - first) if keeps else (passing, 0)
            if layer.index == first:
                x = slabs[0][0, :tokens].copy_(x)
            tail = len(rows) if final else tokens
            _, raw, qkv, attended, mid, gate_up, thin, own = (slab[slot, :tokens] for slab in memory)
            by_stack = layer.by_stack(thin, tail)
            here = Kept(x, raw, qkv, attended, mid[:tail], gate_up[:tail], own[:tail], by_stack)
            x_next = last if final else slabs[0][slot + 1, :tokens] if keeps else x
            layer.forward(context, here, x_next, rows if final else None)
            if keeps:
                kept.append(here)
            x = x_next
        if first:
            self.one_layer.give(passing)
        hidden = torch.empty_like(last)
        self.norm.forward(last, hidden)
        return hidden, Held(kept, last, rows, context, slabs) if keep else None

    @torch.no_grad()
    def backward(
        self, held: Held, d_hidden: Tensor | None, *, wants_x: bool = False
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Gradients of the adapter's parameters, by the parameters' ids, and where it is wanted of x. Spends `held`."""
        assert not wants_x or self.first == 0, "the embedding learns unforeseen"
        grads: dict[int, Tensor] = {}
        dx = torch.zeros_like(held.last)
        if d_hidden is not None:
            rstd = self.norm.forward(held.last, torch.empty_like(held.last))
            self.norm.backward(d_hidden.clone(), held.last, rstd, dx)
        for layer, kept in reversed([*zip(self.layers[self.first :], held.kept, strict=True)]):
            rows = held.rows if layer is self.layers[-1] else None
            wants_dx = wants_x or layer.index > self.first
            dx = layer.backward(held.context, kept, dx, grads, rows=rows, wants_dx=wants_dx)
        self.slabs.give(held.slabs)
        return grads, dx if wants_x else None

    def _rope(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x[None], position_ids[None])
        half = cos.shape[-1] // 2  # the second half repeats the first
        return cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()


def fuse(model: PreTrainedModel, adapter: str) -> FusedDecoder | None:
    """The fused form of a model with this adapter, or None where its structure is another."""
    body: Any = model.base_model
    if _parts(body) != BODY_PARTS or model.device.type != "cpu":
        return None
    layers = [_fuse_layer(i, layer, adapter) for i, layer in enumerate(body.layers)]
    found = [layer for layer in layers if layer is not None]
    same = {(layer.geometry, layer.head_norms is None) for layer in found}
    if len(found) != len(layers) or len(same) != 1 or not hasattr(body.norm, "variance_epsilon"):
        return None
    embedding = body.embed_tokens
    if isinstance(embedding, LoraEmbedding) and (adapter in embedding.adapters or adapter in embedding.tokens):
        first = 0
    else:
        first = next((layer.index for layer in found if layer.learns), len(found))
    return FusedDecoder(model, found, first)


def _fuse_layer(index: int, layer: Any, adapter: str) -> FusedLayer | None:
    parts = {name for name in _parts(layer) if not name.startswith("resid_")}  # Phi-3's dropouts, idle outside training
    if parts != LAYER_PARTS:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    if not (_parts(attention) <= ATTENTION_PARTS and _parts(mlp) <= MLP_PARTS):
        return None
    qkv = _linears(attention, "q_proj", "k_proj", "v_proj") or _linears(attention, "qkv_proj")
    gate_up = _linears(mlp, "gate_proj", "up_proj") or _linears(mlp, "gate_up_proj")
    o, down = _linears(attention, "o_proj"), _linears(mlp, "down_proj")
    if not (qkv and gate_up and o and down):
        return None
    head_dim = int(attention.head_dim)
    stack = Stack(qkv, adapter)
    heads = o[0].in_features // head_dim
    geometry = Geometry(heads, (stack.out_features // head_dim - heads) // 2, head_dim, down[0].in_features)
    norms: list[Any] = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if any(n is not None and not hasattr(n, "variance_epsilon") for n in norms):
        return None
    return FusedLayer(
        index=index,
        geometry=geometry,
        input_norm=norm_of(layer.input_layernorm),
        qkv=stack,
        head_norms=None if norms[0] is None else (norm_of(norms[0]), norm_of(norms[1])),
        o=Stack(o, adapter),
        mlp_norm=norm_of(layer.post_attention_layernorm),
        gate_up=Stack(gate_up, adapter),
        down=Stack(down, adapter),
    )


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _linears(parent: nn.Module, *names: str) -> list[LoraLinear] | None:
    """The named children, if all are LoRA over a linear of [out, in]."""
    found = [getattr(parent, name, None) for name in names]
    plain = [m for m in found if isinstance(m, LoraLinear) and isinstance(m.base, nn.Linear | QuantisedLinear)]
    return plain if len(plain) == len(names) else None
