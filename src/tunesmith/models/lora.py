"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + s B A x, with A [rank, in], B [out, rank], s = alpha / rank.

One layer class serves training and serving: it holds any number of adapters over one frozen linear, and the model's
`Routing` says which rows of a forward pass go through which adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import InputError
from tunesmith.models.quantised import QuantisedLinear
from tunesmith.recipe import Adapter as AdapterSection


@dataclass
class Routing:
    """Which adapter each row of the flat token sequence uses. Rows in no segment go through the base alone."""

    segments: tuple[tuple[str, int, int], ...] = ()  # (adapter name, first row, one past the last row)


@dataclass
class LoraWeights:
    a: nn.Parameter  # [rank, in]
    b: nn.Parameter  # [out, rank]
    scaling: float
    dropout: float = 0.0


class LoraLinear(nn.Module):
    """A frozen linear and the adapters over it. Input [..., tokens, in] with leading dimensions of 1."""

    def __init__(self, base: nn.Linear | Conv1D | QuantisedLinear, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.adapters: dict[str, LoraWeights] = {}
        self.transposed = isinstance(base, Conv1D)  # Conv1D keeps its weight as [in, out]
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = int(base.nx), int(base.nf)
        else:
            self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        if self._learns_alone(x):
            adapter = self.adapters[self.routing.segments[0][0]]
            return _LoraProduct.apply(
                x, self.base.weight, self.base.bias, adapter.a, adapter.b, adapter.scaling, self.transposed
            )
        y = self.base(x)
        for name, start, stop in self.routing.segments:
            adapter = self.adapters.get(name)
            if adapter is None:
                continue
            stop = min(stop, x.shape[-2])
            rows = F.dropout(x[..., start:stop, :], adapter.dropout, self.training).to(adapter.a.dtype)
            delta = (F.linear(F.linear(rows, adapter.a), adapter.b) * adapter.scaling).to(y.dtype)
            if stop - start == x.shape[-2]:
                y = y + delta
            else:
                y = torch.cat((y[..., :start, :], y[..., start:stop, :] + delta, y[..., stop:, :]), dim=-2)
        return y

    def _learns_alone(self, x: Tensor) -> bool:
        """A gradient is wanted, one adapter covers every row, and nothing stands between it and the plain formula."""
        if not torch.is_grad_enabled() or len(self.routing.segments) != 1:
            return False
        name, start, stop = self.routing.segments[0]
        adapter = self.adapters.get(name)
        if adapter is None or start > 0 or stop < x.shape[-2] or not isinstance(self.base, nn.Linear | Conv1D):
            return False
        return not (adapter.dropout and self.training) and adapter.a.dtype == self.base.weight.dtype == x.dtype


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T with a backward that keeps only x and the thin product h = x A^T.

    With g = s dy B:  dx = dy W + g A,  dA = g^T x,  dB = s dy^T h.  The base is frozen: W and bias get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        transposed: bool,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        base = weight if transposed else weight.t()  # [in, out]
        y = torch.mm(flat, base) if bias is None else torch.addmm(bias, flat, base)
        thin = flat @ a.t()
        y.addmm_(thin, b.t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, thin)
        ctx.scaling, ctx.transposed, ctx.shape = scaling, transposed, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flat, weight, a, b, thin = ctx.saved_tensors
        dy = upstream[0].reshape(len(flat), -1)
        g = (dy @ b).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ (weight.t() if ctx.transposed else weight)).addmm_(g, a).view(ctx.shape)
        db = (thin.t() @ dy).t().mul(ctx.scaling)
        return dx, None, None, g.t() @ flat, db, None, None


@dataclass
class LoraModel:
    """A base whose linears carry adapters."""

    model: PreTrainedModel
    routing: Routing
    layers: dict[str, LoraLinear] = field(default_factory=dict)  # by the linear's name in the base

    def parameters(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's parameters by PEFT's names, in a fixed order."""
        for name, layer in self.layers.items():
            weights = layer.adapters.get(adapter)
            if weights is not None:
                yield f"base_model.model.{name}.lora_A.weight", weights.a
                yield f"base_model.model.{name}.lora_B.weight", weights.b

    def use(self, adapter: str | None) -> None:
        """Send every row through one adapter (training, evaluation), or through the base alone."""
        self.routing.segments = () if adapter is None else ((adapter, 0, 1 << 62),)


def linears(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D | QuantisedLinear]:
    """Every linear of the model by name, the output head left out (as PEFT's all-linear)."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | QuantisedLinear) and module is not head
    }


def target_names(names: list[str], target_modules: str | tuple[str, ...]) -> list[str]:
    """Which of a base's linears a recipe's `target_modules` selects, by PEFT's rules. Raises InputError if none."""
    if target_modules == "all-linear":
        chosen = names
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise InputError(f'adapter.target_modules "{target_modules}" is not a regex: {error}') from None
        chosen = [name for name in names if pattern.fullmatch(name)]
    else:
        chosen = [n for n in names if any(n == target or n.endswith("." + target) for target in target_modules)]
    if not chosen:
        kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise InputError(f'adapter.target_modules "{target_modules}" matches no linear of the base; it has {kinds}')
    return chosen


def wrap(model: PreTrainedModel) -> LoraModel:
    """Put a LoraLinear over every linear of the base and freeze it. Names of base weights gain `.base`."""
    model.requires_grad_(False)
    lora = LoraModel(model, Routing())
    for name, linear in linears(model).items():
        layer = LoraLinear(linear, lora.routing)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
        lora.layers[name] = layer
    return lora


def add_new_adapter(lora: LoraModel, name: str, section: AdapterSection, seed: int) -> None:
    """A fresh adapter: A Kaiming-uniform, B zero, so the model starts as the base. Deterministic in `seed`."""
    generator = torch.Generator().manual_seed(seed)
    scaling = section.alpha / (math.sqrt(section.rank) if section.rslora else section.rank)
    for target in target_names(list(lora.layers), section.target_modules):
        layer = lora.layers[target]
        a = torch.empty(section.rank, layer.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        layer.adapters[name] = LoraWeights(
            a=nn.Parameter(a.to(lora.model.device)),
            b=nn.Parameter(torch.zeros(layer.out_features, section.rank, device=lora.model.device)),
            scaling=scaling,
            dropout=section.dropout,
        )
