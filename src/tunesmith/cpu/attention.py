"""Attention of rows that each look at keys and values of their own, which lie in memory as they were cached.

    out[r, h] = sum_j softmax_j(scale q[r, h] . k[j, h / group]) v[j, h / group]       j over the row's pieces

A decoding row has hardly a product in it: every key and value is read once for the heads that share it, in blocks
whose softmax is put together as flash attention does (Dao et al. 2022, arXiv:2205.14135). Nothing is copied or padded.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from tunesmith.cpu.lanes import Lanes, along, exp, sum_along
from tunesmith.cpu.writing import (
    ADDRESS,
    FLOAT,
    LINE,
    LONG,
    NUMBER,
    WATCHED,
    Function,
    Processor,
    at,
    bits_of,
    compiled,
    declare,
    fetch,
    given_number,
    in_threads,
    integer_at,
    long,
    new_module,
    number_at,
    once,
    processor,
    scratch,
    share_of,
    smaller,
    threads_for,
)

INTEGERS = "q"  # 64 bits each
BLOCK = 32  # keys whose scores exist at a time
MOST_VECTORS = 8  # of a head's sum that registers hold at a time


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a store [kv_heads, tokens, dim], or of a slot of one [slots, kv_heads, tokens, dim]."""

    store: int  # which of the stores that attend is given
    start: int
    stop: int
    slot: int = 0


class Pieces:
    """What each row looks at."""

    def __init__(self, rows: Sequence[Sequence[Piece]]) -> None:
        self.table, self.starts, self.tokens = array(INTEGERS), array(INTEGERS, [0]), 0
        for pieces in rows:
            found = [piece for piece in pieces if piece.stop > piece.start]
            for p in found:
                self.table.extend((p.store, p.slot, p.start, p.stop - p.start))
                self.tokens += p.stop - p.start
            self.starts.append(self.starts[-1] + len(found))


class Places:
    """Where each row's own key and value are cached: a slot, and a token of it."""

    def __init__(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        self.table = array(INTEGERS, [number for pair in zip(slots, tokens, strict=True) for number in pair])


def cache(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Places) -> None:
    """Write key and value [kv_heads, rows, dim] to their places in keys and values [slots, kv_heads, tokens, dim]."""
    on = processor()
    kv_heads, rows, dim = key.shape
    assert on is not None
    assert key.stride(2) == value.stride(2) == 1
    assert len(places.table) == 2 * rows
    assert keys.shape == values.shape
    assert keys.is_contiguous()
    assert values.is_contiguous()
    arguments = [rows, kv_heads, dim, NUMBER * keys.stride(0), NUMBER * keys.stride(1), _address(places.table)]
    write = _compiled_cache(on)
    for new, store in ((key, keys), (value, values)):
        write(1, new.data_ptr(), NUMBER * new.stride(1), NUMBER * new.stride(0), store.data_ptr(), *arguments)


def can_attend(query: Tensor, value: Tensor) -> bool:
    """Heads of one size, a multiple of the vectors', in float32."""
    on = processor()
    return (
        on is not None
        and query.device.type == "cpu"
        and query.dtype == torch.float32
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % on.width == 0
    )


def attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    pieces: Pieces,
    scaling: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """query [heads, rows, dim]; keys and values: stores, as Piece says, their tokens contiguous; fills out
    [rows, heads, dim] and lse [rows, heads]. Every row must see at least one token.
    """
    on = processor()
    heads, rows, dim = query.shape
    kv_heads = keys[0].shape[-3]
    assert on is not None
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert out.shape == (rows, heads, dim)
    assert len(pieces.starts) == rows + 1
    for store in (*keys, *values):
        assert store.stride()[-2:] == (dim, 1)
        assert store.shape[-3] == kv_heads
    assert all(k.stride() == v.stride() for k, v in zip(keys, values, strict=True))
    tables = [array(INTEGERS, [store.data_ptr() for store in stores]) for stores in (keys, values)]
    steps = array(INTEGERS)
    for store in keys:
        steps.extend((NUMBER * store.stride(0) if store.dim() == 4 else 0, NUMBER * store.stride(-3)))
    WATCHED.keep(steps)
    WATCHED.keep_addresses(*tables)
    _compiled(on, dim, heads // kv_heads)(
        threads_for(pieces.tokens * kv_heads * dim),
        query.data_ptr(),
        NUMBER * query.stride(1),
        NUMBER * query.stride(0),
        out.data_ptr(),
        lse.data_ptr(),
        _address(pieces.table),
        _address(pieces.starts),
        _address(tables[0]),
        _address(tables[1]),
        _address(steps),
        rows,
        kv_heads,
        bits_of(scaling),
    )


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]


class Writer:
    """Writes the kernel for heads of `dim` numbers, `group` of which share keys and values."""

    def __init__(self, on: Processor, dim: int, group: int) -> None:
        self.on, self.dim, self.group = on, dim, group
        kinds = [LONG, LONG, ADDRESS, LONG, LONG, *[ADDRESS] * 7, LONG, LONG, LONG]
        self.f = f = Function(new_module(), "share", kinds)
        self.b, self.v = f.builder, Lanes(f, on.width)
        thread, threads, query, row_step, head_step, out, lse, table, starts, keys, values, steps = f.arguments[:12]
        rows, kv_heads, bits = f.arguments[12:]
        b = self.b
        self.scale = given_number(b, bits)
        self.scores = [scratch(b, BLOCK * NUMBER) for _ in range(group)]
        self.sums = [scratch(b, dim * NUMBER) for _ in range(group)]
        pairs = b.mul(rows, kv_heads)
        first, last = share_of(b, pairs, thread, threads)
        with f.loop(first, last) as (pair, _, _):
            row, head = b.sdiv(pair, kv_heads), b.srem(pair, kv_heads)
            at_head = b.mul(head, b.mul(head_step, long(group)))
            mine = at(b, query, b.add(b.mul(row, row_step), at_head))
            queries = [at(b, mine, b.mul(head_step, long(g))) for g in range(group)]
            for each in self.sums:
                for i in range(0, dim, on.width):
                    self.v.store(self.v.number(0.0), each, long(i))
            begin, end = integer_at(b, starts, row), integer_at(b, starts, b.add(row, long(1)))
            state = [ir.Constant(FLOAT, number) for number in (float("-inf"), 0.0) for _ in range(group)]
            with f.loop(begin, end, 1, state) as (piece, so_far, following):
                store, slot, start, count = (
                    integer_at(b, table, b.add(b.mul(piece, long(4)), long(n))) for n in range(4)
                )
                slot_step, kv_step = (integer_at(b, steps, b.add(b.mul(store, long(2)), long(n))) for n in range(2))
                offset = b.add(b.mul(slot, slot_step), b.add(b.mul(head, kv_step), b.mul(start, long(dim * NUMBER))))
                k, v = (at(b, b.inttoptr(integer_at(b, a, store), ADDRESS), offset) for a in (keys, values))
                with f.loop(long(0), count, BLOCK, so_far) as (done, before, after):
                    after[:] = self.block(queries, k, v, done, count, kv_step, before)
                following[:] = before
            place = b.add(b.mul(row, b.mul(kv_heads, long(group))), b.mul(head, long(group)))
            self.finish(at(b, out, b.mul(place, long(dim * NUMBER))), at(b, lse, b.mul(place, long(NUMBER))), so_far)
        in_threads(f.itself.module, "attend", f.end())

    def block(self, queries: Any, k: Any, v: Any, done: Any, count: Any, kv_step: Any, state: list[Any]) -> list[Any]:
        """Up to BLOCK keys more: state is each head's largest score, then each head's sum of exponentials.

        Meanwhile their values are fetched, and the next head's keys: a slot's heads lie side by side, and so do slots.
        """
        b, f, group, step = self.b, self.f, self.group, long(self.dim * NUMBER)
        size = smaller(b, b.sub(count, done), long(BLOCK))
        k, v = (at(b, a, b.mul(done, step)) for a in (k, v))
        with f.loop(long(0), size, 1, state[:group]) as (j, before, after):
            key, value = (at(b, a, b.mul(j, step)) for a in (k, v))
            for line in range(0, self.dim * NUMBER, LINE):
                for place in (value, at(b, key, kv_step)):
                    fetch(f.itself.module, b, at(b, place, long(line)))
            for g, query in enumerate(queries):
                dot = self.v.number(0.0)
                for i in range(0, self.dim, self.on.width):
                    dot = self.v.multiply_add(self.v.load(query, long(i)), self.v.load(key, long(i)), dot)
                score = b.fmul(self.v.total(dot), self.scale)
                b.store(score, at(b, self.scores[g], b.mul(j, long(NUMBER))), align=NUMBER)
                after[g] = b.select(b.fcmp_ordered(">", score, before[g]), score, before[g])
        largest, totals = list(before), []
        for g in range(group):
            totals.append(self.weigh(g, size, v, b.fsub(state[g], largest[g]), largest[g], state[group + g]))
        return [*largest, *totals]

    def weigh(self, g: int, size: Any, v: Any, shrunk: Any, largest: Any, total: Any) -> Any:
        """Add a block's values to a head's sums; returns its sum of exponentials."""
        b, f, scores = self.b, self.f, self.scores[g]
        kept = exp(f, shrunk)

        def exponential(lanes: Lanes, i: Any, so_far: Any) -> Any:
            power = lanes.exp(b.fsub(lanes.load(scores, i), lanes.everywhere(largest)))
            lanes.store(power, scores, i)
            return b.fadd(so_far, power)

        added = sum_along(f, self.on, size, exponential)
        width = self.on.width * MOST_VECTORS
        for start in range(0, self.dim, width):
            places = range(start, min(start + width, self.dim), self.on.width)
            held = [b.fmul(self.v.load(self.sums[g], long(i)), self.v.everywhere(kept)) for i in places]
            with f.loop(long(0), size, 1, held) as (j, before, after):
                weight = number_at(b, scores, j)
                value = at(b, v, b.mul(j, long(self.dim * NUMBER)))
                for n, i in enumerate(places):
                    after[n] = self.v.multiply_add(self.v.everywhere(weight), self.v.load(value, long(i)), before[n])
            for n, i in enumerate(places):
                self.v.store(before[n], self.sums[g], long(i))
        return b.fadd(b.fmul(total, kept), added)

    def finish(self, out: Any, lse: Any, state: list[Any]) -> None:
        b = self.b
        log = declare(self.f.itself.module, "llvm.log.f32", [FLOAT], FLOAT)
        for g in range(self.group):
            largest, total = state[g], state[self.group + g]
            b.store(b.fadd(largest, b.call(log, [total])), at(b, lse, long(g * NUMBER)), align=NUMBER)
            factor = self.v.everywhere(b.fdiv(ir.Constant(FLOAT, 1.0), total))
            for i in range(0, self.dim, self.on.width):
                self.v.store(b.fmul(self.v.load(self.sums[g], long(i)), factor), out, long(g * self.dim + i))


@once
def _compiled(on: Processor, dim: int, group: int) -> Callable[..., None]:
    return compiled(Writer(on, dim, group).f.itself.module, "attend")


def _write_cache(on: Processor) -> ir.Module:
    f = Function(new_module(), "share", [LONG, LONG, ADDRESS, LONG, LONG, ADDRESS, *[LONG] * 5, ADDRESS])
    b = f.builder
    new, row_step, head_step, store, rows, kv_heads, dim, slot_step, kv_step, places = f.arguments[2:]
    with f.loop(long(0), rows) as (row, _, _):
        slot, token = (integer_at(b, places, b.add(b.mul(row, long(2)), long(n))) for n in range(2))
        start = b.add(b.mul(slot, slot_step), b.mul(token, b.mul(dim, long(NUMBER))))
        with f.loop(long(0), kv_heads) as (head, _, _):
            source = at(b, new, b.add(b.mul(row, row_step), b.mul(head, head_step)))
            target = at(b, store, b.add(start, b.mul(head, kv_step)))

            def move(v: Lanes, i: Any, source: Any = source, target: Any = target) -> None:
                v.store(v.load(source, i), target, i)

            along(f, on, long(0), dim, move)
    in_threads(f.itself.module, "cache", f.end())
    return f.itself.module


@once
def _compiled_cache(on: Processor) -> Callable[..., None]:
    return compiled(_write_cache(on), "cache")
