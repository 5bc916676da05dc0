"""Eight bits a weight: every output channel has one scale, its largest magnitude over 127. And a fast product of them.

A quarter to read is what decoding on a CPU gains most by. The product is one of integers, so inputs must be integers
too. One of 8 bits costs a large model's answers a twentieth of a nat a token; two, a coarse and a fine one, cost
nothing that could be measured, and a second row is free while the weights come from memory:

    x = s (h + l / (2 L)),    s = max |x| / L,    h = round(x / s),    l = round(2 L (x / s - h))    in [-L, L] each

L is 63, not 127: without VNNI two products of 8 bits are added up in 16, which only 7 bits on one side never overflow.
Each row has its own s, so that an answer does not depend on what else is in the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.models.packed import joined_bias
from tunesmith.models.quantised import Stored

LEVELS, ZERO = 63, 64  # h and l lie in 1 to 127 when ZERO is added
ENGINE = "fbgemm"  # torch's product of 8-bit integers on x86


class Int8(Stored):
    """A matrix in int8: W = codes * scale, codes [out, in], scale [out, 1]."""

    codes: Tensor
    scale: Tensor

    def __init__(self, matrix: Tensor) -> None:
        """matrix [out, in], any floating type."""
        super().__init__()
        self.shape = (matrix.shape[0], matrix.shape[1])
        matrix = matrix.detach().float()
        scale = matrix.abs().amax(1, keepdim=True).div_(127)
        scale[scale == 0] = 1.0
        self.register_buffer("codes", (matrix / scale).round_().char(), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def write(self, out: Tensor) -> None:
        out.view(self.shape).copy_(self.codes).mul_(self.scale)


class Int8Linear:
    """y = x W^T + b over matrices that share their input, as PackedLinear. x [rows, in], float32 on the CPU."""

    def __init__(self, matrices: Sequence[Int8], biases: Sequence[Tensor | None] = ()) -> None:
        """matrices: each [out, in]; biases: each [out], or None. What they are packed into is a copy."""
        codes = torch.cat([matrix.codes for matrix in matrices])
        scales = torch.cat([matrix.scale for matrix in matrices])[:, 0]
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch 2.13 means to move this elsewhere some day
                quantised = torch._make_per_channel_quantized_tensor(  # pyright: ignore[reportPrivateImportUsage]
                    codes, scales.double(), torch.zeros(len(scales), dtype=torch.long), 0
                )
            self.weight = torch.ops.quantized.linear_prepack(quantised, None)
        finally:
            torch.backends.quantized.engine = before
        self.bias = joined_bias([matrix.shape[0] for matrix in matrices], biases)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], new."""
        step = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_(min=1e-30).div_(LEVELS)
        exact = x / step
        coarse = exact.round()
        both = torch.cat((coarse, exact.sub_(coarse).mul_(2 * LEVELS)))
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, ZERO, self.weight)
        y = torch.add(y[: len(x)], y[len(x) :], alpha=1 / (2 * LEVELS)).mul_(step)
        return y if self.bias is None else y.add_(self.bias)


def can_run_int8() -> bool:
    """Whether this machine has the product."""
    return ENGINE in torch.backends.quantized.supported_engines
