"""Memory straight from the system."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from tunesmith.cpu import pages as module
from tunesmith.cpu.pages import CHUNK, LargePages
from tunesmith.models.memory import resident_bytes


def test_pieces_are_zeros_of_their_own() -> None:
    pages = LargePages()
    pieces = [pages.zeros(count, torch.float32) for count in (3, 1000, CHUNK // 8, CHUNK // 4 + 1, CHUNK // 8, 0, 7)]
    for number, piece in enumerate(pieces, 1):
        assert not piece.any()
        assert piece.data_ptr() % 64 == 0
        piece.fill_(number)
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces, 1))
    codes = pages.zeros(5, torch.int8)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [0] * 5


def test_a_system_without_large_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(module.mmap, "mmap", Refusing)
    assert LargePages().zeros(5, torch.float32).tolist() == [0.0] * 5


@pytest.mark.skipif(sys.platform != "linux", reason="measured in /proc")
def test_pages_go_with_the_last_piece_in_them() -> None:
    pages, before = LargePages(), resident_bytes()
    pieces = [pages.zeros(CHUNK // 16, torch.float32).fill_(1.0) for _ in range(8)]  # two chunks
    assert resident_bytes() - before > 2 * CHUNK - (8 << 20)
    del pieces[:4]
    assert resident_bytes() - before < CHUNK + (8 << 20)
    assert float(pieces[0].sum()) == CHUNK // 16
    del pieces
    assert resident_bytes() - before < 8 << 20
    assert not pages.zeros(9, torch.float32).any()
