"""Blocks of rows against runs of keys, against softmax over a dense mask and its derivative, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunesmith.cpu import flash
from tunesmith.cpu.sight import ALWAYS, FIELDS, PIECE, ROWS, Seen, Sight
from tunesmith.cpu.writing import Processor


def causal(rows: int, before: int = 0) -> Seen:
    """Rows that stand behind so many keys more."""
    keys = np.arange(before + rows)
    return Seen(keys[before:], keys[before:], keys, np.full(len(keys), ALWAYS), np.full(len(keys), ALWAYS))


def windowed(rows: int, window: int) -> Seen:
    keys = np.arange(rows)
    return Seen(keys, keys, keys, np.full(rows, ALWAYS), keys + window)


def branches(prefix: int, *lengths: int) -> Seen:
    """A prefix, then branches that see it and themselves."""
    starts = np.cumsum([0, prefix, *lengths])
    ends = np.concatenate([np.full(prefix, starts[-1]), *(np.full(n, s + n) for n, s in zip(lengths, starts[1:]))])  # noqa: B905
    keys = np.arange(starts[-1])
    return Seen(keys, keys, keys, ends, np.full(len(keys), ALWAYS))


SEEN = {
    "one": causal(1),
    "causal": causal(2 * ROWS + 5),
    "long": causal(7, before=2 * PIECE + 3),
    "windowed": windowed(3 * ROWS, 20),
    "branches": branches(37, 3, ROWS, 100, 1, 64),
    "everything": Seen(np.zeros(9), np.zeros(9), np.zeros(70), *[np.full(70, ALWAYS)] * 2),
}


def visible(seen: Seen) -> torch.Tensor:
    order, places = (each[:, None] for each in (seen.order, seen.places))
    return torch.from_numpy((seen.begins <= order) & (order < seen.ends) & (places < seen.reach))


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: Seen, scaling: float) -> torch.Tensor:
    """[rows, heads, dim]"""
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, 1) for each in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * scaling
    weights = scores.masked_fill(~visible(seen), -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value)


@pytest.mark.parametrize("what", SEEN)
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(1, 1, 32), (2, 3, 64)])
def test_it_is_softmax_over_what_is_seen_and_its_derivative(
    kernels: Processor, threads: int, what: str, kv_heads: int, group: int, dim: int
) -> None:
    seen, heads = SEEN[what], kv_heads * group
    rows, keys = len(seen.order), len(seen.begins)
    qkv = torch.randn(max(rows, keys), heads + 2 * kv_heads, dim)  # as a decoder has them, side by side
    query, key, value = qkv[:rows, :heads], qkv[:keys, heads : heads + kv_heads], qkv[:keys, heads + kv_heads :]
    sight, d_out = Sight(seen), torch.randn(rows, heads, dim)
    out = torch.empty(rows, heads, dim)
    lse = flash.forward(query, key, value, sight, 0.2, out)
    exact = [each.double().requires_grad_() for each in (query, key, value)]
    expected = dense(*exact, seen, 0.2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    scores = torch.einsum("ihd,jhd->hij", query.double(), key.double().repeat_interleave(group, 1)) * 0.2
    logs = scores.masked_fill(~visible(seen), -torch.inf).logsumexp(-1).T
    torch.testing.assert_close(lse.double(), logs, rtol=1e-5, atol=1e-5)

    grads = tuple(torch.full_like(qkv, 7.0)[: len(each), : each.shape[1]] for each in (query, key, value))
    flash.backward(d_out, (query, key, value, out, lse), sight, 0.2, grads)
    for found, wanted in zip(grads, torch.autograd.grad(expected, exact, d_out.double()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def test_what_nobody_sees_is_not_computed() -> None:
    sight = Sight(branches(0, *[ROWS] * 20))
    keys, rows = sight.table[1::FIELDS], sight.table[3::FIELDS]
    needed = 20 * ROWS * (ROWS + 1) // 2
    assert needed <= sum(k * r for k, r in zip(keys, rows, strict=True)) <= 1.5 * needed


def test_what_cannot_be_seen_adds_nothing_however_large_it_is(kernels: Processor) -> None:
    seen = branches(5, 20, 20)
    query, key, value = (torch.randn(45, 1, 32) for _ in range(3))
    key[25:], value[25:] = 1e30, 1e30
    out = torch.empty(45, 1, 32)
    flash.forward(query, key, value, Sight(seen), 0.2, out)
    torch.testing.assert_close(out[:25], dense(query[:25], key[:25], value[:25], branches(5, 20), 0.2))


def test_attention_goes_on_over_other_keys(kernels: Processor, threads: int) -> None:
    """A prefix after what is a row's own, some rows too far away to see it, is the same as both at once."""
    rows, before, window = 2 * ROWS + 5, PIECE + 7, ROWS + 20
    places = np.arange(before + rows)
    reach = places + np.where(places < before, window, ALWAYS // 2)
    seen = Seen(places[before:], places[before:], places, np.full(len(places), ALWAYS), reach)
    query, key, value = (torch.randn(len(places), heads, 64) for heads in (6, 2, 2))
    out = torch.empty(rows, 6, 64)
    lse = flash.forward(query[before:], key[before:], value[before:], Sight(causal(rows)), 0.2, out)
    ends = np.full(before, ALWAYS)
    prefix = Seen(places[before:], places[before:], places[:before], ends, reach[:before])
    sight = Sight(prefix)
    flash.forward(query[before:], key[:before], value[:before], sight, 0.2, out, lse, goes_on=True)
    expected = torch.empty_like(out)
    logs = flash.forward(query[before:], key, value, Sight(seen), 0.2, expected)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, logs, rtol=1e-5, atol=1e-5)
    exact = dense(query[before:].double(), key.double(), value.double(), seen, 0.2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
