"""Run a transformers decoder over one flat sequence of tokens, with attention of our own.

Training (a token tree) and serving (a cache) differ only in who may look at whom. Both hand a context to the model
through the forward's keyword arguments; the model definitions stay those of transformers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tunesmith.errors import InputError

ATTENTION = "tunesmith"


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


def prepare(model: PreTrainedModel) -> None:
    """Route the model's attention through contexts. Raises InputError, naming the model, where that is not possible."""
    probe = _Probe()
    name = type(model).__name__
    layers = model.config.get_text_config().num_hidden_layers
    kinds = set(getattr(model.config, "layer_types", None) or ())
    foreign = kinds - {"full_attention", "sliding_attention"}
    if foreign:
        raise InputError(f"{name} has layers of kind {', '.join(sorted(foreign))}, which tunesmith cannot run")
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION)
        ids = torch.zeros(2, dtype=torch.long, device=model.device)
        with torch.no_grad():
            run_body(model, ids, torch.arange(2, device=model.device), probe)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        model.set_attn_implementation(before)
        raise InputError(f"{name} does not go through transformers' attention interface ({error})") from None
    if probe.layers != set(range(layers)):
        model.set_attn_implementation(before)
        raise InputError(f"{name} does not go through transformers' attention interface in every layer")


def run_body(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
    """The decoder without its head: input_ids, position_ids [tokens] -> normalised hidden states [tokens, hidden]."""
    out = model.base_model(
        input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, tunesmith_context=context
    )
    return out.last_hidden_state[0]


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output head's weight [vocabulary, hidden]."""
    return model.get_output_embeddings().weight  # type: ignore[union-attr, return-value]


class _Probe:
    """Notes which layers asked for attention."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        self.layers.add(layer)
        return query.transpose(1, 2)
