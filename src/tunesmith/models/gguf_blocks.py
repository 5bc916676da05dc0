"""The blocks that GGUF files keep weights in, as the file has them, and the numbers they stand for.

Each function below turns blocks [n, bytes] into `out` [n, numbers], float32, exactly as the `gguf` package does (ggml's
own reference): the same products and sums in the same order. Blocks lie along a row, so rows may be moved whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunesmith.cpu import nibbles
from tunesmith.cpu.writing import Processor
from tunesmith.models.quantised import Stored

AT_ONCE = 1 << 18  # numbers at a time: what that needs stays in cache


@dataclass(frozen=True)
class BlockKind:
    """`numbers` of them lie in `bytes`. `kernel`: the same as `write`, where there are kernels."""

    numbers: int
    bytes: int
    write: Callable[[Tensor, Tensor], object]
    kernel: Callable[[Processor, Tensor, Tensor], object] | None = None


class Blocks(Stored):
    """A matrix in the blocks of a GGUF file."""

    def __init__(self, kind: str, rows: npt.NDArray[np.uint8]) -> None:
        """rows [out, bytes of a row], copied. Raises KeyError for a kind not in KINDS."""
        super().__init__()
        self.kind = KINDS[kind]
        self.shape = (rows.shape[0], rows.shape[1] // self.kind.bytes * self.kind.numbers)
        self.register_buffer("rows", torch.from_numpy(np.array(rows, dtype=np.uint8)), persistent=False)

    def write(self, out: Tensor) -> None:
        kind = self.kind
        blocks, into = self.get_buffer("rows").view(-1, kind.bytes), out.view(-1, kind.numbers)
        on = nibbles.kernels_for(blocks, into)
        if kind.kernel is not None and on is not None:
            kind.kernel(on, blocks, into)
            return
        step = max(1, AT_ONCE // kind.numbers)
        for start in range(0, len(blocks), step):
            kind.write(blocks[start : start + step], into[start : start + step])


def _float(dtype: torch.dtype) -> Callable[[Tensor, Tensor], object]:
    return lambda blocks, out: out.copy_(blocks.view(dtype))


def _half(blocks: Tensor, at: int) -> Tensor:
    """A float16 within each block -> [n, 1]"""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[n, groups, width] -> [n, groups, 2, width]: the low halves of a group's bytes, then the high ones."""
    out = packed.new_empty(*packed.shape[:2], 2, packed.shape[2])
    torch.bitwise_and(packed, 15, out=out[:, :, 0])
    torch.bitwise_right_shift(packed, 4, out=out[:, :, 1])
    return out


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, None, 2:])
    out.copy_(codes.view(out.shape)).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, None, 4:])
    out.copy_(codes.view(out.shape)).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, None, 6:]).view(out.shape)
    fifth = _bits(blocks.device)[blocks[:, 2:6].int()].view(torch.uint8)  # [n, 32]
    out.copy_(codes.bitwise_or_(fifth)).sub_(16).mul_(_half(blocks, 0))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    scale, offset = _six_bit_scales(blocks)
    codes = _nibbles(blocks[:, 16:].unflatten(1, (4, 32)))
    parts = out.view(-1, 8, 32)
    parts.copy_(codes.view(parts.shape)).mul_(scale).sub_(offset)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    scale, offset = _six_bit_scales(blocks)
    codes = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts).bitwise_and_(1).bitwise_left_shift_(4)
    out.view(codes.shape).copy_(codes.bitwise_or_(fifth)).mul_(scale).sub_(offset)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts).bitwise_and_(3).bitwise_left_shift_(4)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # [n, 16]
    out.view(codes.shape).copy_(codes.bitwise_or_(high)).sub_(32)
    out.view(-1, 16, 16).mul_(scale[:, :, None])


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of the eight parts of a K block, 6 bits each in its bytes 4 to 16 -> [n, 8, 1] twice"""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), 1)
    offset = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), 1)
    return (_half(blocks, 0) * scale.float())[:, :, None], (_half(blocks, 2) * offset.float())[:, :, None]


@cache
def _bits(device: torch.device) -> Tensor:
    """[256] a byte's eight bits, the lowest first, each as 16 in a byte of its own, as one int64."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (16 * bits).to(torch.uint8).view(torch.int64).view(-1).to(device)


KINDS = {
    "F32": BlockKind(1, 4, _float(torch.float32)),
    "F16": BlockKind(1, 2, _float(torch.float16)),
    "BF16": BlockKind(1, 2, _float(torch.bfloat16)),
    "Q4_0": BlockKind(32, 18, _q4_0, partial(nibbles.write_gguf, offset=False)),
    "Q4_1": BlockKind(32, 20, _q4_1, partial(nibbles.write_gguf, offset=True)),
    "Q5_0": BlockKind(32, 22, _q5_0),
    "Q8_0": BlockKind(32, 34, _q8_0),
    "Q4_K": BlockKind(256, 144, _q4_k),
    "Q5_K": BlockKind(256, 176, _q5_k),
    "Q6_K": BlockKind(256, 210, _q6_k),
}
