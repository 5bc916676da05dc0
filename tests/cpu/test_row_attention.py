"""Rows over pieces of several stores, against softmax over all of a row's keys at once."""

from __future__ import annotations

import pytest
import torch

from tunesmith.cpu import attention
from tunesmith.cpu.attention import Piece, Pieces
from tunesmith.cpu.writing import Processor


@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(1, 1, 16), (3, 3, 64), (2, 4, 160)])
def test_it_is_softmax_over_all_pieces(kernels: Processor, threads: int, kv_heads: int, group: int, dim: int) -> None:
    stores = [(torch.randn(4, kv_heads, 50, dim), torch.randn(4, kv_heads, 50, dim))]  # slots
    stores += [(torch.randn(kv_heads, n, dim), torch.randn(kv_heads, n, dim)) for n in (100, 33)]
    rows = [
        [Piece(0, 0, 50, slot=2)],
        [Piece(1, 0, 100), Piece(2, 5, 33), Piece(0, 3, 4, slot=3)],
        [Piece(1, 7, 7), Piece(2, 32, 33)],
    ]
    query = (torch.randn(3, kv_heads * group + 2, dim) * 4).transpose(0, 1)[: kv_heads * group]
    out, lse = torch.empty(3, kv_heads * group, dim), torch.empty(3, kv_heads * group)
    keys, values = zip(*stores, strict=True)
    attention.attend(query, keys, values, Pieces(rows), 0.3, out, lse)
    for row, pieces in enumerate(rows):
        parts = [
            torch.cat(
                [(side[p.store][p.slot] if p.store == 0 else side[p.store])[:, p.start : p.stop] for p in pieces], 1
            )
            for side in (keys, values)
        ]
        k, v = (part.double().repeat_interleave(group, 0) for part in parts)
        scores = torch.einsum("hd,hjd->hj", query[:, row].double(), k) * 0.3
        torch.testing.assert_close(lse[row].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
        expected = torch.einsum("hj,hjd->hd", scores.softmax(-1), v)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_keys_and_values_go_to_their_places_and_nowhere_else(kernels: Processor) -> None:
    keys, values = torch.zeros(3, 2, 9, 20), torch.zeros(3, 2, 9, 20)
    key, value = torch.randn(4, 5, 20).transpose(0, 1)[:2], torch.randn(2, 4, 20)
    slots, tokens = [2, 0, 2, 1], [8, 0, 3, 5]
    attention.cache(key, value, keys, values, attention.Places(slots, tokens))
    for new, store in ((key, keys), (value, values)):
        expected = torch.zeros_like(store)
        expected[slots, :, tokens] = new.transpose(0, 1)
        assert torch.equal(store, expected)
