"""Fold an adapter into its base: W' = W + s B A, and plain linears where the LoraLinears were."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.models.lora import LoraModel
from tunesmith.models.quantised import QuantisedLinear


@torch.no_grad()
def merge(lora: LoraModel, name: str) -> PreTrainedModel:
    """The base with adapter `name` in its weights; the LoraModel is spent."""
    for path, layer in lora.layers.items():
        weights, base = layer.adapters.get(name), layer.base
        if isinstance(base, QuantisedLinear):  # the numbers it was trained over, so that nothing changes
            base = base.plain()
        if weights is not None:
            delta = weights.scaling * (weights.b @ weights.a)  # [out, in]
            base.weight.add_((delta.t() if isinstance(base, Conv1D) else delta).to(base.weight.dtype))
        parent, _, last = path.rpartition(".")
        setattr(lora.model.get_submodule(parent), last, base)
    lora.layers.clear()
    return lora.model
