"""Linears whose frozen weights stay bytes: dequantised whenever they are used, forward and backward alike.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314) is LoRA over such a linear, not a mode of training. How bytes stand for
numbers is the business of nf4.py, int8.py and gguf_blocks.py; nothing else knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.recipe import Quantize


class Stored(nn.Module):
    """A matrix kept as bytes, in buffers. `shape` is [out, in]."""

    shape: tuple[int, int]

    def write(self, out: Tensor) -> None:
        """Put the numbers into `out` [out * in], float32 and contiguous."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())


class QuantisedLinear(nn.Module):
    """y = x W^T + b, W frozen and kept as bytes. x [..., in], of `dtype`."""

    def __init__(self, stored: Stored, linear: nn.Linear | Conv1D, how: Quantize, dtype: torch.dtype) -> None:
        """In place of `linear`, whose bias it takes over. `how` is the recipe's name for it."""
        super().__init__()
        self.stored, self.dtype = stored, dtype
        self.how: Quantize = how
        self.out_features: int = stored.shape[0]
        self.in_features: int = stored.shape[1]
        self.bias: nn.Parameter | None = linear.bias
        self._of_conv = isinstance(linear, Conv1D)  # which keeps [in, out]

    @property
    def weight(self) -> Tensor:
        """The whole matrix [out, in], made anew each time it is asked for."""
        return self.dequantise()

    @torch.no_grad()
    def dequantise(self, out: Tensor | None = None) -> Tensor:
        """The whole matrix [out, in], into `out` where there is one."""
        numbers = self.out_features * self.in_features
        if out is None:
            out = torch.empty(self.stored.shape, dtype=self.dtype, device=self._device)
        if out.dtype == torch.float32 and out.is_contiguous():
            self.stored.write(out.view(-1))
        else:
            exact = torch.empty(numbers, dtype=torch.float32, device=self._device)
            self.stored.write(exact)
            out.copy_(exact.view(self.stored.shape))
        return out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[assignment]
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def plain(self) -> nn.Linear | Conv1D:
        """The layer of the model's own class with the same numbers."""
        if self._of_conv:
            layer: nn.Linear | Conv1D = Conv1D(self.out_features, self.in_features)
            weight = self.weight.t().contiguous()
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
            weight = self.weight
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = self.bias
        return layer

    @property
    def _device(self) -> torch.device:
        return next(self.stored.buffers()).device


class _Product(torch.autograd.Function):
    """y = x W^T; keeps nothing, since the backward makes W again: dx = dy W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return x @ linear.dequantise().t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return upstream[0] @ ctx.linear.dequantise(), None


def stack_matrices(linears: Sequence[QuantisedLinear], out: Tensor) -> Tensor:
    """The matrices of linears that share their input, below one another in `out` [sum of out, in]."""
    start = 0
    for linear in linears:
        linear.dequantise(out=out[start : start + linear.out_features])
        start += linear.out_features
    return out


def quantised_linears(model: PreTrainedModel) -> list[QuantisedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantisedLinear)]


def quantisation(model: PreTrainedModel) -> Quantize | None:
    """How a base's linears are kept; None where they are plain numbers."""
    found = quantised_linears(model)
    return found[0].how if found else None


def count_weights(model: PreTrainedModel) -> int:
    """How many numbers a model has, quantised ones among them."""
    plain = sum(parameter.numel() for parameter in model.parameters())
    return plain + sum(linear.in_features * linear.out_features for linear in quantised_linears(model))
