"""Fold an adapter into its base: W' = W + s B A, and plain linears where the LoraLinears were."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tunesmith.models.lora import LoraModel


@torch.no_grad()
def merge(lora: LoraModel, name: str) -> PreTrainedModel:
    """The base with adapter `name` in its weights; the LoraModel is spent."""
    for path, layer in lora.layers.items():
        weights = layer.adapters.get(name)
        if weights is not None:
            delta = weights.scaling * (weights.b @ weights.a)  # [out, in]
            layer.base.weight.add_((delta.t() if layer.transposed else delta).to(layer.base.weight.dtype))
        parent, _, last = path.rpartition(".")
        setattr(lora.model.get_submodule(parent), last, layer.base)
    lora.layers.clear()
    return lora.model
