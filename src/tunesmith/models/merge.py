"""Fold an adapter into its base: W' = W + s B A (DoRA: g times that), and plain linears where the LoraLinears were."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.models.dora import gain
from tunesmith.models.lora import LoraLinear, LoraModel, replace_module
from tunesmith.models.quantised import QuantisedLinear


@torch.no_grad()
def merge(lora: LoraModel, name: str) -> PreTrainedModel:
    """The base with adapter `name` in its weights; the LoraModel is spent.

    An embedding and a head that share their weight part where the adapter treats them differently.
    """
    ends = [end for end in lora.ends.values() if name in end.adapters]
    if ends and len({end.base.weight.data_ptr() for end in lora.ends.values()}) < len(lora.ends):
        base = ends[0].base
        assert not isinstance(base, QuantisedLinear), "only inner linears are quantised"
        base.weight = nn.Parameter(base.weight.clone(), requires_grad=False)
        lora.model.config.tie_word_embeddings = False
    for path, layer in lora.everywhere.items():
        if isinstance(layer, LoraLinear) and isinstance(
            layer.base, QuantisedLinear
        ):  # the numbers it was trained over, so that nothing changes
            layer.base = layer.base.plain()
            layer.transposed = isinstance(layer.base, Conv1D)
        weights = layer.adapters.get(name)
        if weights is not None:
            delta = weights.scaling * (weights.b @ weights.a)  # [out, in]
            if weights.magnitude is not None:
                g = gain(layer.dense(), weights)[:, None]
                delta = g * delta + (g - 1) * layer.dense()
            layer.dense().add_(delta.to(layer.base.weight.dtype))
        tokens = layer.tokens.get(name)
        if tokens is not None:
            layer.base.weight[tokens.ids] = tokens.rows.to(layer.base.weight.dtype)
        replace_module(lora.model, path, layer.base)
    lora.layers.clear()
    lora.ends.clear()
    return lora.model
