"""Run a transformers decoder over one flat sequence of tokens, with attention of our own.

Training (a token tree) and serving (a cache) differ only in who may look at whom. Both hand a context to the model
through the forward's keyword arguments; the model definitions stay those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tunesmith.errors import InputError
from tunesmith.tree.heads import head_of
from tunesmith.tree.layout import build_tree
from tunesmith.tree.oracle import DenseContext
from tunesmith.types import TokenizedExample

ATTENTION = "tunesmith"
WINDOWED = "sliding_attention"
ATTENDING = {"full_attention", WINDOWED, "attention", "hybrid"}  # kinds of layer that attend as the context does


class AttentionContext(Protocol):
    """Computes attention for the tokens of one forward pass; knows who may look at whom."""

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
        """query [1, heads, tokens, dim]; key, value [1, kv_heads, tokens, dim] -> [1, tokens, heads, dim]."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tunesmith_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert tunesmith_context is not None, "the model dropped the attention context; use run_body"
    out = tunesmith_context.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return out, None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The context is the mask."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


@dataclass(frozen=True)
class LayerAttention:
    """How a layer of the model calls attention."""

    scaling: float
    sliding_window: int | None
    softcap: float | None


class Listener:
    """An AttentionContext that is another, and notes how each layer calls it: what a few tokens can't tell apart."""

    def __init__(self, context: AttentionContext) -> None:
        self.context = context
        self.layers: dict[int, LayerAttention] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        self.layers[layer] = LayerAttention(**settings)
        return self.context.attend(layer, query, key, value, **settings)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a prepared model may be given. `reason` is a sentence for the user where sharing is off."""

    share: bool  # sequences may branch from one another and lie in one pass
    reason: str | None = None


def prepare(model: PreTrainedModel) -> Abilities:
    """Route the model's attention through contexts, and prove on a few tokens that nothing is lost by it.

    Raises InputError, naming the model, where that is not possible: a model that keeps its attention to itself, or
    whose attention, positions or output head do more than tunesmith computes.
    """
    name, before = type(model).__name__, model.config._attn_implementation or "eager"
    try:
        with _evaluation(model), torch.no_grad():
            return _route(model, name)
    except (
        InputError,
        AssertionError,
        AttributeError,
        KeyError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        model.set_attn_implementation(before)
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} does not go through transformers' attention interface ({error})") from None


def run_body(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
    """The decoder without its head: input_ids, position_ids [tokens] -> normalised hidden states [tokens, hidden]."""
    out = model.base_model(
        input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, tunesmith_context=context
    )
    return out.last_hidden_state[0]


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output head's weight [vocabulary, hidden]."""
    return head_of(model).weight


def _route(model: PreTrainedModel, name: str) -> Abilities:
    model.set_attn_implementation("eager")
    ids = torch.arange(6, device=model.device)
    expected = model(input_ids=ids[None], use_cache=False).logits[0].float()
    model.set_attn_implementation(ATTENTION)
    probe = _Probe([[0, 1, 2, 3, 4, 5]])
    hidden = probe.run(model)
    _check_layers(model, name, probe)
    if not _close(expected, head_of(model).logits(hidden).float()):
        raise InputError(f"{name} computes something in its attention or output head that tunesmith cannot follow")
    # Two branches behind one prefix. Where the second sees anything of the first, layers carry a state of their own.
    branched, alone = _Probe([[0, 1, 2, 3, 4], [0, 1, 2, 5]]).run(model), _Probe([[0, 1, 2, 5]]).run(model)
    if not _close(alone[-1].float(), branched[-1].float()):
        return Abilities(False, f"{name} carries a state from token to token, so every row is computed by itself")
    return Abilities(True)


def _check_layers(model: PreTrainedModel, name: str, probe: _Probe) -> None:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    if not probe.windows:
        raise InputError(f"{name} does not go through transformers' attention interface")
    for layer, kind in enumerate(kinds):
        attends = layer in probe.windows
        if kind is None and not attends:
            raise InputError(f"{name} does not go through transformers' attention interface in every layer")
        if attends != (kind is None or kind in ATTENDING):
            raise InputError(f"{name} has layers of kind {kind}, which tunesmith cannot run")
        if kind == WINDOWED and probe.windows[layer] is None:
            raise InputError(f"{name} hides its sliding window from transformers' attention interface")


@contextmanager
def _evaluation(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _close(expected: Tensor, actual: Tensor) -> bool:
    """Equal but for rounding; bfloat16 rounds at 2^-8."""
    return bool((expected - actual).abs().max() <= 0.03 * expected.abs().max().clamp(min=1e-6))


class _Probe(DenseContext):
    """Notes which layers asked for attention, and with which window."""

    def __init__(self, sequences: list[list[int]]) -> None:
        rows = [
            TokenizedExample("probe", np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.float32))
            for ids in sequences
        ]
        super().__init__(build_tree(rows))
        self.windows: dict[int, int | None] = {}

    def run(self, model: PreTrainedModel) -> Tensor:
        ids = torch.as_tensor(self.tree.input_ids, device=model.device)
        return run_body(model, ids, torch.as_tensor(self.tree.position_ids, device=model.device), self)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        self.windows[layer] = settings["sliding_window"]
        return super().attend(layer, query, key, value, **settings)
