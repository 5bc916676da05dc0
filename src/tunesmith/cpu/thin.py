"""Many adapters in one batch: each row x has ranks of its own, rows of tables of all adapters' A and B.

    low[l, p] = A[rank, l] x[row]          A [room, linears, in]
    y_l[row] += low[l, p] B_l[rank]        B [room, out], the columns of all linears side by side

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
        """uses: an adapter's rows of the tables, and the first and one past the last row of x that use it; no two have
        a row of x in common."""
        found: list[tuple[int, int, int, int]] = []  # table row, first row of x, how many, their place among all pairs
        self.pairs, edges = 0, [0]
        for ranks, start, stop in uses:
            for rank in ranks:
                found.append((rank, start, stop - start, self.pairs))
                self.pairs += stop - start
            if len(found) > edges[-1]:
                edges.append(len(found))
        self.table = torch.tensor(found, dtype=torch.long).reshape(-1, 4)
        # Shares of as many entries as can be, none of which cuts a use in two; None where uses are too few for that.
        threads = torch.get_num_threads()
        self.shares: Tensor | None = None
        if len(edges) - 1 >= USES_A_THREAD * threads:
            wanted = [len(found) * thread / threads for thread in range(threads + 1)]
            self.shares = torch.tensor([min(edges, key=lambda edge: abs(edge - each)) for each in wanted])

    def each(self) -> tuple[Tensor, Tensor]:
        """Every pair's rank and row."""
        rank, start, _, place = self.table.repeat_interleave(self.table[:, 2], 0).unbind(1)
        return rank, start + torch.arange(self.pairs) - place


def add(downs: Tensor, ups: Tensor, ends: Tensor, entries: Entries, x: Tensor, y: Tensor) -> None:
    """Adds to y [rows, out]. downs [room, linears, in] and ups [room, out], contiguous; ends [linears] int64, where
    each linear's columns end; x [rows, in]."""
    linears, width = downs.shape[1:]
    if (on := processor()) is None:
        ranks, rows = entries.each()
        low = torch.einsum("pli,pi->lp", downs[ranks], x[rows])
        widths = ends.diff(prepend=ends.new_zeros(1))
        y.index_add_(0, rows, low.T.repeat_interleave(widths, 1) * ups[ranks])
        return
    assert downs.is_contiguous()
    assert ups.is_contiguous()
    assert len(ends) == linears
    assert x.stride(1) == y.stride(1) == 1
    assert x.shape[1] == width
    assert y.shape[1] == ups.shape[1]
    low = x.new_empty(linears, entries.pairs)
    given = [downs.data_ptr(), ups.data_ptr(), ends.data_ptr(), entries.table.data_ptr(), len(entries.table)]
    given += [entries.pairs, linears, low.data_ptr(), x.data_ptr(), NUMBER * x.stride(0), width]
    given += [y.data_ptr(), NUMBER * y.stride(0), y.shape[1]]
    if entries.shares is not None:
        _compiled(on, "both")(len(entries.shares) - 1, entries.shares.data_ptr(), *given)
        return
    _compiled(on, "down")(threads_for(entries.pairs * linears * width), 0, *given)
    _compiled(on, "up")(threads_for(entries.pairs * y.shape[1]), 0, *given)


KINDS = [LONG, LONG, *[ADDRESS] * 5, LONG, LONG, LONG, ADDRESS, ADDRESS, LONG, LONG, ADDRESS, LONG, LONG]


class Given:
    """A kernel's arguments."""

    def __init__(self, f: Function) -> None:
        self.thread, self.threads, self.shares, self.downs, self.ups, self.ends, self.entries = f.arguments[:7]
        self.count, self.pairs, self.linears, self.low, self.x, self.x_step, self.width = f.arguments[7:14]
        self.y, self.y_step, self.out = f.arguments[14:]


def _write(on: Processor, name: str) -> ir.Module:
    """`both`: each thread goes all the way for rows of its own, which is quickest. Where these are too few threads
    share the entries (`down`) and then, when all is done, the columns of y (`up`)."""
    f = Function(new_module(), "share", KINDS)
    b, given = f.builder, Given(f)
    everything = long(0), given.count
    if name == "both":
        first, last = (integer_at(b, given.shares, b.add(given.thread, long(n))) for n in (0, 1))
        _down(f, on, given, (first, last))
        _up(f, on, given, (first, last), (long(0), given.out))
    elif name == "down":
        _down(f, on, given, share_of(b, given.count, given.thread, given.threads))
    else:
        vectors = share_of(b, b.sdiv(given.out, long(on.width)), given.thread, given.threads)
        first, last = (b.mul(end, long(on.width)) for end in vectors)
        at_last = b.icmp_signed("==", b.add(given.thread, long(1)), given.threads)
        _up(f, on, given, everything, (first, b.select(at_last, given.out, last)))
    in_threads(f.itself.module, name, f.end())
    return f.itself.module


def _down(f: Function, on: Processor, given: Given, entries: tuple[Any, Any]) -> None:
    b, size = f.builder, f.builder.mul(given.width, long(NUMBER))
    with f.loop(*entries) as (entry, _, _):
        rank, start, rows, place = _entry(f, given.entries, entry)
        with f.loop(long(0), given.linears) as (linear, _, _):
            a = at(b, given.downs, b.mul(b.add(b.mul(rank, given.linears), linear), size))
            found = at(b, given.low, b.mul(b.add(b.mul(linear, given.pairs), place), long(NUMBER)))
            with f.loop(long(0), rows) as (row, _, _):
                own = at(b, given.x, b.mul(b.add(start, row), given.x_step))

                def add(v: Lanes, i: Any, so_far: Any, a: Any = a, own: Any = own) -> Any:
                    return v.multiply_add(v.load(a, i), v.load(own, i), so_far)

                total = sum_along(f, on, given.width, add, WAYS)
                b.store(total, at(b, found, b.mul(row, long(NUMBER))), align=NUMBER)


def _up(f: Function, on: Processor, given: Given, entries: tuple[Any, Any], columns: tuple[Any, Any]) -> None:
    b, (first, last) = f.builder, columns
    with f.loop(*entries) as (entry, _, _):
        rank, start, rows, place = _entry(f, given.entries, entry)
        up_row = at(b, given.ups, b.mul(rank, b.mul(given.out, long(NUMBER))))
        with f.loop(long(0), given.linears, 1, [long(0)]) as (linear, (column,), following):
            end = following[0] = integer_at(b, given.ends, linear)
            factors = at(b, given.low, b.mul(b.add(b.mul(linear, given.pairs), place), long(NUMBER)))
            column = b.select(b.icmp_signed(">", column, first), column, first)
            with f.loop(long(0), rows) as (row, _, _):
                own = at(b, given.y, b.mul(b.add(start, row), given.y_step))
                factor = number_at(b, factors, row)

                def add(v: Lanes, i: Any, own: Any = own, factor: Any = factor, up_row: Any = up_row) -> None:
                    v.store(v.multiply_add(v.everywhere(factor), v.load(up_row, i), v.load(own, i)), own, i)

                along(f, on, column, smaller(b, end, last), add)


def _entry(f: Function, entries: Any, i: Any) -> list[Any]:
    return [integer_at(f.builder, entries, f.builder.add(f.builder.mul(i, long(4)), long(n))) for n in range(4)]


@once
def _compiled(on: Processor, name: str) -> Callable[..., None]:
    return compiled(_write(on, name), name)
