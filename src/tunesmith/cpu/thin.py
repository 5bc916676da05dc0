"""Many adapters in one batch: each row x has ranks of its own, rows of tables of all adapters' A and B.

    low[l, e] = A[ranks[e], l] x[owners[e]]          `down`: entry e is one rank of one row; A [room, linears, in]
    y[owners[e]] += low[e] B[ranks[e]]               `up`: B [room, out], one linear

Each number of a table that is needed is read once, in order, which is all it costs: 16 adapters of rank 25 are as much
to read as a base of 135 million weights in its linears.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from tunesmith.cpu.lanes import Lanes, along, sum_along
from tunesmith.cpu.writing import (
    ADDRESS,
    LONG,
    NUMBER,
    Function,
    Processor,
    at,
    compiled,
    in_threads,
    integer_at,
    long,
    new_module,
    number_at,
    once,
    processor,
    share_of,
    threads_for,
)

WAYS = 4  # sums at a time


def down(table: Tensor, ranks: Tensor, owners: Tensor, x: Tensor) -> Tensor:
    """low [linears, entries]. table [room, linears, in], contiguous; ranks and owners [entries] int64; x [rows, in]."""
    linears, entries, width = table.shape[1], len(ranks), table.shape[2]
    if (on := processor()) is None:
        return torch.einsum("eli,ei->le", table[ranks], x[owners])
    assert table.is_contiguous()
    assert x.stride(1) == 1
    assert x.shape[1] == width
    low = x.new_empty(linears, entries)
    _compiled(on, _write_down, "down")(
        threads_for(entries * linears * width),
        table.data_ptr(),
        ranks.data_ptr(),
        owners.data_ptr(),
        x.data_ptr(),
        NUMBER * x.stride(0),
        low.data_ptr(),
        entries,
        linears,
        width,
    )
    return low


def up(table: Tensor, ranks: Tensor, owners: Tensor, low: Tensor, y: Tensor) -> None:
    """Adds to y [rows, out]. table [room, out], contiguous; low, ranks and owners [entries], owners ascending."""
    if (on := processor()) is None:
        y.index_add_(0, owners, low[:, None] * table[ranks])
        return
    assert table.is_contiguous()
    assert low.is_contiguous()
    assert y.stride(1) == 1
    assert y.shape[1] == table.shape[1]
    _compiled(on, _write_up, "up")(
        threads_for(len(ranks) * y.shape[1]),
        table.data_ptr(),
        ranks.data_ptr(),
        owners.data_ptr(),
        low.data_ptr(),
        y.data_ptr(),
        NUMBER * y.stride(0),
        len(ranks),
        y.shape[1],
    )


def _write_down(on: Processor) -> ir.Module:
    kinds = [LONG, LONG, *[ADDRESS] * 4, LONG, ADDRESS, LONG, LONG, LONG]
    f = Function(new_module(), "share", kinds)
    b = f.builder
    thread, threads, table, ranks, owners, x, x_step, low, entries, linears, width = f.arguments
    size = b.mul(width, long(NUMBER))
    first, last = share_of(b, entries, thread, threads)
    with f.loop(first, last) as (entry, _, _):
        rank, owner = (integer_at(b, a, entry) for a in (ranks, owners))
        row = at(b, x, b.mul(owner, x_step))
        with f.loop(long(0), linears) as (linear, _, _):
            a = at(b, table, b.mul(b.add(b.mul(rank, linears), linear), size))
            total = sum_along(f, on, width, lambda v, i, s: v.multiply_add(v.load(a, i), v.load(row, i), s), WAYS)
            place = b.add(b.mul(linear, entries), entry)
            b.store(total, at(b, low, b.mul(place, long(NUMBER))), align=NUMBER)
    in_threads(f.itself.module, "down", f.end())
    return f.itself.module


def _write_up(on: Processor) -> ir.Module:
    """Threads share the columns."""
    f = Function(new_module(), "share", [LONG, LONG, *[ADDRESS] * 5, LONG, LONG, LONG])
    b = f.builder
    thread, threads, table, ranks, owners, low, y, y_step, entries, width = f.arguments
    vectors = b.sdiv(width, long(on.width))
    first, last = (b.mul(end, long(on.width)) for end in share_of(b, vectors, thread, threads))
    last = b.select(b.icmp_signed("==", b.add(thread, long(1)), threads), width, last)
    with f.loop(long(0), entries) as (entry, _, _):
        rank, owner = (integer_at(b, a, entry) for a in (ranks, owners))
        row, target = at(b, table, b.mul(rank, b.mul(width, long(NUMBER)))), at(b, y, b.mul(owner, y_step))
        factor = number_at(b, low, entry)

        def add(v: Lanes, i: Any) -> None:
            v.store(v.multiply_add(v.everywhere(factor), v.load(row, i), v.load(target, i)), target, i)

        along(f, on, first, last, add)
    in_threads(f.itself.module, "up", f.end())
    return f.itself.module


@once
def _compiled(on: Processor, write: Callable[[Processor], ir.Module], name: str) -> Callable[..., None]:
    return compiled(write(on), name)
