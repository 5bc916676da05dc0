"""Frozen weights as 8-bit integers: a quarter to read, which is what decoding on a CPU waits for.

A weight's row has one scale, its largest magnitude / 127 (as a base trained over `base.quantize: int8` has). The
product is one of integers, so inputs must be integers too. One of 8 bits costs a large model's answers a twentieth of a
nat a token; two, a coarse and a fine one, cost nothing that could be measured, and a second row is free while the
weights come from memory:

    x = s (h + l / (2 L)),    s = max |x| / L,    h = round(x / s),    l = round(2 L (x / s - h))    in [-L, L] each

L is 63, not 127: without VNNI two products of 8 bits are added up in 16, which only 7 bits on one side never overflow.
Each row has its own s, so that an answer does not depend on what else is in the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.models.lora import linears
from tunesmith.models.packed import joined_bias

LEVELS, ZERO = 63, 64  # h and l lie in 1 to 127 when ZERO is added
ENGINE = "fbgemm"  # torch's product of 8-bit integers on x86


class Int8Linear:
    """y = x W^T + b over linears that share their input, as PackedLinear. x [rows, in], float32 on the CPU."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> None:
        stacked = torch.cat([weight.detach() for weight in weights])
        integers, scales = quantise(stacked)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch 2.13 means to move this elsewhere some day
                quantised = torch._make_per_channel_quantized_tensor(  # pyright: ignore[reportPrivateImportUsage]
                    integers, scales.double(), torch.zeros(len(scales), dtype=torch.long), 0
                )
            self.weight = torch.ops.quantized.linear_prepack(quantised, None)
        finally:
            torch.backends.quantized.engine = before
        self.bias = joined_bias(weights, biases)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], new."""
        step = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_(min=1e-30).div_(LEVELS)
        exact = x / step
        coarse = exact.round()
        both = torch.cat((coarse, exact.sub_(coarse).mul_(2 * LEVELS)))
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, ZERO, self.weight)
        y = torch.add(y[: len(x)], y[len(x) :], alpha=1 / (2 * LEVELS)).mul_(step)
        return y if self.bias is None else y.add_(self.bias)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> integers [out, in] and scales [out], W = integers * scales."""
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-30)
    return (weight / scales[:, None]).round().to(torch.int8), scales


@torch.no_grad()
def round_weights(model: PreTrainedModel) -> None:
    """Let every inner linear's weights be what 8-bit integers can say, whatever computes with them."""
    for linear in linears(model).values():
        weight = linear.weight if isinstance(linear, torch.nn.Linear) else linear.weight.t()  # Conv1D keeps [in, out]
        integers, scales = quantise(weight)
        weight.copy_(integers * scales[:, None])


def can_run_int8(weight: Tensor) -> bool:
    """Whether this machine has the product."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and ENGINE in torch.backends.quantized.supported_engines
    )
