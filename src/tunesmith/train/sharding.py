"""Weights, gradients and optimiser spread over the workers: FSDP2 (Zhao et al. 2023, arXiv:2304.11277; fully_shard).

Every worker holds 1 / N of each tensor. A layer's weights are gathered for its forward and again for its backward, and
its gradient is added up and scattered as soon as it is there. So all workers make the same passes at the same time;
what is computed in them differs. Checkpoints are written in as many parts by torch.distributed.checkpoint, as
safetensors that say which part of which tensor they hold, so that any number of workers can read them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from tunesmith.train import parallel
from tunesmith.train.forward import ModuleBody

T = TypeVar("T")
AHEAD = 2  # layers whose weights are gathered at a time: the one that runs and the next
STATE_COPIES = 3  # gradient and two moments


class ShardedBody(ModuleBody):
    """A model through its own modules, its weights spread over the workers.

    bytes_per_token  what a token keeps for the backward pass, counted before the weights were spread
    gathered_bytes   what is held of others' weights at a time, and of gradients before they are scattered
    """

    sharded = True

    def __init__(self, plain: ModuleBody, parameters: Mapping[str, nn.Parameter], bytes_per_token: int) -> None:
        self.gathered_bytes = _gathered_bytes(plain.model, parameters)
        self.bytes_per_token = bytes_per_token
        _spread(plain.model)
        super().__init__(plain.model, list(parameters.values()))

    def compute(self, work: Callable[[], T]) -> T:
        return self.model.compute(work)  # type: ignore[operator]


def spread(plain: ModuleBody, parameters: dict[str, nn.Parameter], bytes_per_token: int) -> ShardedBody:
    """Spread a model over the workers; `parameters` of the model become the parts that this one holds, in place."""
    body = ShardedBody(plain, parameters, bytes_per_token)
    own = dict(body.model.named_parameters())
    for name in parameters:
        parameters[name] = own.get(name, parameters[name])
    body.parameters = list(parameters.values())
    return body


def saved_bytes(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> int:
    """What a worker need not hold of spread weights: (1 - 1/N) of them and of their state, less what is gathered."""
    learned = sum(_bytes(p) for name, p in parameters.items() if name in dict(model.named_parameters()))
    whole = sum(_bytes(p) for p in model.parameters()) + STATE_COPIES * learned
    return whole - whole // parallel.size() - _gathered_bytes(model, parameters)


def full_state(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Every weight of a spread model, whole and on the CPU, for the first worker; None of one that is not. All call."""
    found: dict[str, Tensor] = {}
    if not any(map(parallel.is_sharded, model.parameters())):
        return None
    for name, tensor in model.named_parameters():  # tied ones once, as they are written
        whole = tensor.full_tensor()  # type: ignore[attr-defined]
        if parallel.is_first():
            found[name] = whole.detach().cpu()
    return found


def write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write this worker's parts of the tensors into the folder; all must call. Returns its file."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(cast("dict[str, Any]", dict(tensors)), storage_writer=writer)
    path = next(folder.glob(f"shard-{parallel.rank() + 1:05d}-*"))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def read_parts(folder: Path, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's parameters and optimiser, spread as `like` is, however many workers wrote it. All must call."""
    known: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            known.update(file.keys())
    parameters = {name: torch.empty_like(tensor.detach()) for name, tensor in like.items()}
    optimizer = {}
    for name, tensor in like.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{name}.{key}" in known:
                optimizer[f"{name}.{key}"] = torch.zeros(()) if key == "step" else torch.empty_like(tensor.detach())
    asked = cast("dict[str, Any]", {**parameters, **optimizer})
    load(asked, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=parallel.size() == 1)
    return parameters, optimizer


def _spread(model: PreTrainedModel) -> None:
    """One group a layer, and one for what lies around them: embeddings, last norm, head."""
    wide = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(model.dtype, torch.float32))
    for module in (*_layers(model), model):
        fully_shard(module, mp_policy=wide, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # a sum: the step knows its weight
        module.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True, recurse=False)
    # The body and the head are used apart, not through the model's own forward: this stands in for it.
    model.compute = MethodType(_compute, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "compute")


def _compute(model: PreTrainedModel, work: Callable[[], T]) -> T:
    return work()


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    return next(child for child in model.base_model.children() if isinstance(child, nn.ModuleList))


def _gathered_bytes(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> int:
    layers = [sum(_bytes(p) for p in layer.parameters()) for layer in _layers(model)]
    around = sum(_bytes(p) for p in model.parameters()) - sum(layers)
    learns = any(name in parameters for name, _ in model.named_parameters())
    return (around + AHEAD * max(layers)) * (2 if learns else 1)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
