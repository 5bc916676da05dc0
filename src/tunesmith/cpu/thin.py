"""Many adapters in one batch: each row x has ranks of its own, rows of tables of all adapters' A and B.

    low[l, p] = A[rank, l] x[row]          `down`: A [room, linears, in]
    y_l[row] += low[l, p] B_l[rank]        `up`: B [room, out], the columns of all linears side by side

p are pairs of a rank and a row. An entry is a rank with all rows side by side that use it, so that each number of a
table that is needed is read once, in order, which is all it costs: 16 adapters of rank 25 are as much to read as a base
of 135 million weights in its linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    smaller,
    threads_for,
)

WAYS = 4  # sums at a time
USES_A_THREAD = 4  # from which on each thread has rows of its own


class Entries:
    """Which rows use which ranks."""

    def __init__(self, uses: Iterable[tuple[Iterable[int], int, int]]) -> None:
        """uses: an adapter's rows of the tables, and the first and one past the last row of x that use it."""
        found: list[tuple[int, int, int, int]] = []  # table row, first row of x, how many, their place among all pairs
        self.pairs = 0
        for ranks, start, stop in uses:
            for rank in ranks:
                found.append((rank, start, stop - start, self.pairs))
                self.pairs += stop - start
        self.uses = len({start for _, start, _, _ in found})  # of those that have ranks
        self.table = torch.tensor(found, dtype=torch.long).reshape(-1, 4)

    def each(self) -> tuple[Tensor, Tensor]:
        """Every pair's rank and row."""
        rank, start, _, place = self.table.repeat_interleave(self.table[:, 2], 0).unbind(1)
        return rank, start + torch.arange(self.pairs) - place


def down(table: Tensor, entries: Entries, x: Tensor) -> Tensor:
    """low [linears, pairs]. table [room, linears, in], contiguous; x [rows, in]."""
    linears, width = table.shape[1:]
    if (on := processor()) is None:
        ranks, rows = entries.each()
        return torch.einsum("pli,pi->lp", table[ranks], x[rows])
    assert table.is_contiguous()
    assert x.stride(1) == 1
    assert x.shape[1] == width
    low = x.new_empty(linears, entries.pairs)
    _compiled(on, _write_down, "down")(
        threads_for(entries.pairs * linears * width),
        table.data_ptr(),
        entries.table.data_ptr(),
        x.data_ptr(),
        NUMBER * x.stride(0),
        low.data_ptr(),
        len(entries.table),
        entries.pairs,
        linears,
        width,
    )
    return low


def up(table: Tensor, ends: Tensor, entries: Entries, low: Tensor, y: Tensor) -> None:
    """Adds to y [rows, out]. table [room, out], contiguous; ends [linears] int64, where each one's columns end; low
    [linears, pairs]."""
    if (on := processor()) is None:
        ranks, rows = entries.each()
        widths = ends.diff(prepend=ends.new_zeros(1))
        y.index_add_(0, rows, low.T.repeat_interleave(widths, 1) * table[ranks])
        return
    assert table.is_contiguous()
    assert low.is_contiguous()
    assert low.shape == (len(ends), entries.pairs)
    assert y.stride(1) == 1
    assert y.shape[1] == table.shape[1]
    threads = threads_for(entries.pairs * y.shape[1])
    _compiled(on, _write_up, "up")(
        threads,
        int(entries.uses >= USES_A_THREAD * threads),
        table.data_ptr(),
        ends.data_ptr(),
        entries.table.data_ptr(),
        low.data_ptr(),
        y.data_ptr(),
        NUMBER * y.stride(0),
        len(entries.table),
        entries.pairs,
        len(ends),
        y.shape[1],
    )


def _write_down(on: Processor) -> ir.Module:
    """Threads share the entries."""
    f = Function(new_module(), "share", [LONG, LONG, *[ADDRESS] * 3, LONG, ADDRESS, *[LONG] * 4])
    b = f.builder
    thread, threads, table, entries, x, x_step, low, count, pairs, linears, width = f.arguments
    size = b.mul(width, long(NUMBER))
    first, last = share_of(b, count, thread, threads)
    with f.loop(first, last) as (entry, _, _):
        rank, start, rows, place = _entry(f, entries, entry)
        with f.loop(long(0), linears) as (linear, _, _):
            a = at(b, table, b.mul(b.add(b.mul(rank, linears), linear), size))
            found = at(b, low, b.mul(b.add(b.mul(linear, pairs), place), long(NUMBER)))
            with f.loop(long(0), rows) as (row, _, _):
                own = at(b, x, b.mul(b.add(start, row), x_step))

                def add(v: Lanes, i: Any, so_far: Any, a: Any = a, own: Any = own) -> Any:
                    return v.multiply_add(v.load(a, i), v.load(own, i), so_far)

                total = sum_along(f, on, width, add, WAYS)
                b.store(total, at(b, found, b.mul(row, long(NUMBER))), align=NUMBER)
    in_threads(f.itself.module, "down", f.end())
    return f.itself.module


def _write_up(on: Processor) -> ir.Module:
    """Threads share the rows of y, which a table is read fastest for; where these are few, its columns."""
    f = Function(new_module(), "share", [LONG, LONG, LONG, *[ADDRESS] * 5, *[LONG] * 5])
    b = f.builder
    thread, threads, by_rows, table, ends, entries, low, y, y_step, count, pairs, linears, width = f.arguments
    vectors = b.sdiv(width, long(on.width))
    first, last = (b.mul(end, long(on.width)) for end in share_of(b, vectors, thread, threads))
    last = b.select(b.icmp_signed("==", b.add(thread, long(1)), threads), width, last)
    begin, until = (_next_use(f, entries, count, end) for end in share_of(b, count, thread, threads))
    whole = b.icmp_signed("!=", by_rows, long(0))
    first, last = b.select(whole, long(0), first), b.select(whole, width, last)
    begin, until = b.select(whole, begin, long(0)), b.select(whole, until, count)
    with f.loop(begin, until) as (entry, _, _):
        rank, start, rows, place = _entry(f, entries, entry)
        up_row = at(b, table, b.mul(rank, b.mul(width, long(NUMBER))))
        with f.loop(long(0), linears, 1, [long(0)]) as (linear, (column,), following):
            end = following[0] = integer_at(b, ends, linear)
            factors = at(b, low, b.mul(b.add(b.mul(linear, pairs), place), long(NUMBER)))
            column = b.select(b.icmp_signed(">", column, first), column, first)
            with f.loop(long(0), rows) as (row, _, _):
                own, factor = at(b, y, b.mul(b.add(start, row), y_step)), number_at(b, factors, row)

                def add(v: Lanes, i: Any, own: Any = own, factor: Any = factor, up_row: Any = up_row) -> None:
                    v.store(v.multiply_add(v.everywhere(factor), v.load(up_row, i), v.load(own, i)), own, i)

                along(f, on, column, smaller(b, end, last), add)
    in_threads(f.itself.module, "up", f.end())
    return f.itself.module


def _next_use(f: Function, entries: Any, count: Any, i: Any) -> Any:
    """The entry at or after `i` whose rows are not those of the one before."""
    b = f.builder
    with f.loop(b.select(b.icmp_signed(">", i, long(0)), i, count), count, 1, [i]) as (entry, (place,), following):
        rows, before = (_entry(f, entries, each)[1] for each in (entry, b.sub(entry, long(1))))
        goes_on = b.and_(b.icmp_signed("==", rows, before), b.icmp_signed("==", place, entry))
        following[0] = b.select(goes_on, b.add(entry, long(1)), place)
    return place


def _entry(f: Function, entries: Any, i: Any) -> list[Any]:
    return [integer_at(f.builder, entries, f.builder.add(f.builder.mul(i, long(4)), long(n))) for n in range(4)]


@once
def _compiled(on: Processor, write: Callable[[Processor], ir.Module], name: str) -> Callable[..., None]:
    return compiled(write(on), name)
