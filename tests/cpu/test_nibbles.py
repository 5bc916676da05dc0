"""Weights of four bits by kernels: the numbers of plain mathematics, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.cpu import nibbles
from tunesmith.cpu.writing import Processor
from tunesmith.models.gguf_blocks import Blocks
from tunesmith.models.nf4 import Nf4


def blocks(count: int, header: int) -> Tensor:
    """Random ones whose float16 numbers are finite."""
    halves = torch.randn(count, header // 2).half().view(torch.uint8)
    return torch.cat((halves.view(count, header), torch.randint(256, (count, 16), dtype=torch.uint8)), 1)


@pytest.mark.parametrize("count", [1, 7, 3000])
@pytest.mark.parametrize(("kind", "header"), [("Q4_0", 2), ("Q4_1", 4)])
def test_blocks_of_gguf_files(on: Processor | None, threads: int, kind: str, header: int, count: int) -> None:
    given, out = blocks(count, header), torch.full((count + 1, 32), 7.0)
    matrix = Blocks(kind, given.numpy())
    matrix.write(out[:count].view(-1))
    code = torch.cat((given[:, header:] & 15, given[:, header:] >> 4), 1).float()
    scale = given[:, :2].view(torch.float16).float()
    expected = code * scale + given[:, 2:4].view(torch.float16).float() if header == 4 else (code - 8) * scale
    assert torch.equal(out[:count], expected)
    assert (out[count] == 7.0).all()


@pytest.mark.parametrize("count", [1, 5, 3000])
@pytest.mark.parametrize("width", [8, 16])
def test_nf4(threads: int, count: int, width: int) -> None:
    own = nibbles.nf4_kernels_for()
    if own is None or own.width < width:  # a narrower vector's instructions are there too
        pytest.skip("no such vectors")
    on = own._replace(width=width)
    torch.manual_seed(count)
    codes, out = torch.randint(256, (count, 32), dtype=torch.uint8), torch.full((count + 1, 64), 7.0)
    scales, table = torch.randn(count), torch.randn(16)
    nibbles.write_nf4(on, codes, scales, table, out[:count])
    places = torch.stack((codes >> 4, codes & 15), 2).flatten(1).long()
    assert torch.equal(out[:count], table[places] * scales[:, None])
    assert (out[count] == 7.0).all()


@pytest.mark.parametrize("shape", [(3, 64), (5, 33), (1, 7)])
def test_nf4_without_kernels(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    matrix = Nf4(torch.randn(shape))
    one, other = torch.empty(2, shape[0] * shape[1])
    matrix.write(one)
    monkeypatch.setattr(nibbles, "processor", lambda: None)
    matrix.write(other)
    assert torch.equal(one, other)
