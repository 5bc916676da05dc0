"""NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314): 4.13 bits a weight.

    weights   in blocks of 64: each number is code[4 bits] * absmax of its block
    absmax    less their mean, in blocks of 256: byte code[8 bits] * absmax of the block, plus the mean

The numbers are those of bitsandbytes 0.50 (quantize_4bit with compress_statistics, on the CPU), bit for bit.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tunesmith.cpu import nibbles
from tunesmith.models.quantised import Stored

BLOCK, SCALE_BLOCK = 64, 256
AT_ONCE = 1 << 17  # bytes that are looked up at a time: what that needs stays in cache
BINS = 65536
# Quantiles of the normal distribution, zero among them, scaled to [-1, 1]: appendix E of the paper.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Nf4(Stored):
    """A matrix in NF4. Its numbers are taken row after row; blocks may run over the ends of rows."""

    def __init__(self, matrix: Tensor) -> None:
        """matrix [out, in], any floating type."""
        super().__init__()
        self.shape = (matrix.shape[0], matrix.shape[1])
        flat = matrix.reshape(-1).float()
        blocks, absmax = _blocks(flat, BLOCK)
        code = _code(flat.device)
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
        if left := len(flat) % BLOCK:  # bitsandbytes divides in the last block where it is not full
            scaled[-1, :left] = (flat[-left:] / absmax[-1].clamp(min=1e-38)).clamp(-1, 1)
        bits = torch.bucketize(scaled.view(-1)[: len(flat) + len(flat) % 2], (code[1:] + code[:-1]) / 2).to(torch.uint8)
        mean = absmax.mean()
        scale_bits, scales = _quantise_scales(absmax - mean)
        for name, value in {"codes": (bits[::2] << 4) | bits[1::2], "absmax": scale_bits, "scales": scales}.items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("mean", mean, persistent=False)

    def write(self, out: Tensor) -> None:
        absmax, codes = self._absmax(), self.get_buffer("codes")
        whole = len(out) // BLOCK * BLOCK
        full = codes[: whole // 2], absmax[: whole // BLOCK]
        if (on := nibbles.nf4_kernels_for(codes, absmax, out)) is not None:
            nibbles.write_nf4(on, *full, _code(out.device), out[:whole])
        else:
            _look_up(*full, out[:whole])
        if left := len(out) - whole:
            last = _pairs(out.device)[codes[whole // 2 :].int()].view(torch.float32)
            torch.mul(last[:left], absmax[-1], out=out[whole:])

    def _absmax(self) -> Tensor:
        """[blocks]"""
        bits, scales = self.get_buffer("absmax"), self.get_buffer("scales")
        per_block = scales.repeat_interleave(SCALE_BLOCK)[: len(bits)]
        return _scale_code(bits.device).index_select(0, bits.int()).mul_(per_block).add_(self.get_buffer("mean"))


def _look_up(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    """Whole blocks by PyTorch. codes [blocks * 32], absmax [blocks] -> out [blocks * 64]."""
    pairs, numbers = _pairs(out.device), len(out)
    into = out if out.storage_offset() % 2 == 0 else torch.empty_like(out)
    both = into.view(torch.int64)  # two numbers at a time: what one byte stands for
    for start in range(0, numbers // 2, AT_ONCE):
        stop = min(start + AT_ONCE, numbers // 2)
        torch.index_select(pairs, 0, codes[start:stop].int(), out=both[start:stop])
        scales = absmax[2 * start // BLOCK : 2 * stop // BLOCK, None]
        into[2 * start : 2 * stop].view(-1, BLOCK).mul_(scales)
    if into is not out:
        out.copy_(into)


def _blocks(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[blocks, size], the last filled up with zeros, and each one's largest magnitude [blocks]."""
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    return blocks, blocks.abs().amax(1)


def _quantise_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """-> bytes [values], absmax [blocks of 256].

    bitsandbytes' CPU kernel looks the nearest code up in a table over [-1, 1], so a code may miss the nearest by a
    65,536th.
    """
    blocks, absmax = _blocks(values, SCALE_BLOCK)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)[: len(values)]
    places = ((scaled + 1.0) * ((BINS - 1) / 2) + 0.5).int().clamp_(0, BINS - 1)
    codes = _nearest_codes(values.device)[places]
    codes[(absmax == 0).repeat_interleave(SCALE_BLOCK)[: len(codes)]] = 0  # any code is right there; this is theirs
    return codes, absmax


@cache
def _nearest_codes(device: torch.device) -> Tensor:
    """[BINS] the code nearest to the value in the middle of each bin."""
    code = _scale_code(device)
    values = torch.arange(BINS, device=device) * (2.0 / (BINS - 1)) - 1.0
    return torch.bucketize(values, (code[1:] + code[:-1]) / 2).to(torch.uint8)


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256] the two float32 numbers that a byte stands for, high bits first, as one int64."""
    byte, code = torch.arange(256, device=device), _code(device)
    return torch.stack((code[byte >> 4], code[byte & 15]), 1).view(torch.int64).view(-1)


@cache
def _code(device: torch.device) -> Tensor:
    return torch.tensor(CODE, device=device)


@cache
def _scale_code(device: torch.device) -> Tensor:
    """The signed dynamic 8-bit code (Dettmers 2016, arXiv:1511.04561), ascending [256].

    Seven decades; the i-th is cut into 2^i equal parts, each standing for its middle, once for either sign.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (ends[:-1] + ends[1:]) / 2
        values += ((10 ** (decade - 6)) * middles).tolist() + ((-(10 ** (decade - 6))) * middles).tolist()
    return torch.tensor(sorted(values), device=device)
