"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), its learning-rate schedules, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from tunesmith.train import parallel

Schedule = Literal["cosine", "linear", "constant"]


def lr_at(step: int, steps: int, lr: float, schedule: Schedule, warmup_ratio: float) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up to `lr`, then down to 0 or constant.

    Warm-up lasts ceil(warmup_ratio * steps) steps and its first step already learns; the last step is above 0.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return lr * (left if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))


def adamw(
    parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the parameters in their order; biases and norms (one dimension) are not decayed."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=0.0, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def grad_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The 2-norm of all gradients together, whole where the workers hold parts of them; inf or nan where one is."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return 0.0
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(parallel.local(g)) for g in grads])))
    return math.sqrt(sum(part**2 for part in parallel.gather(norm))) if parallel.is_sharded(grads[0]) else norm


def scale_grads(parameters: Iterable[nn.Parameter], factor: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def state_tensors(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state by parameter name, for a checkpoint: step counts and both moments."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """The reverse of `state_tensors`."""
    for name, parameter in parameters.items():
        mine = {
            key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors
        }
        if mine:
            optimizer.state[parameter] = {key: value.clone() for key, value in mine.items()}
