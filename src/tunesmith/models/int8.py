"""Eight bits a weight: every output channel has one scale, its largest magnitude over 127.

A quarter to read is what decoding on a CPU gains most by; the codes become numbers in registers (tunesmith.cpu), so
the product is that of the dequantised matrix.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.models.quantised import Stored


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
