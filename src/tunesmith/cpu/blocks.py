"""Blocks of rows, each on an adapter of its own: what prompts of several adapters are in one batch.

    y_l[rows] += (x[rows] A_l^T) B_l      A_l and B_l are rows of the tables of all adapters' numbers, as in cpu/thin.py

A dozen rows at a time go all the way, so that nothing between the two products is ever in memory. A lies along x, so
its product is of sums along both; B lies along y, and is read as a panel of other products is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from tunesmith.cpu.lanes import Lanes, along
from tunesmith.cpu.tiles import call_for, walk
from tunesmith.cpu.writing import (
    ADDRESS,
    FLOAT,
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
    once,
    parts_of,
    processor,
    scratch,
    smaller,
    threads_for,
)

RANKS = 32  # of an adapter at a time
A_ROWS = 4  # of A at a time
UNIT = 5  # integers that say what a unit is


class Blocks:
    """Which rows use which ranks."""

    def __init__(self, uses: Sequence[tuple[Sequence[int], int, int]]) -> None:
        """uses: an adapter's rows of the tables, ascending, and the first and one past the last row of x that use it;
        no two have a row of x in common."""
        self.uses = [use for use in uses if len(use[0])]
        self.work = sum(len(ranks) * (stop - start) for ranks, start, stop in self.uses)
        units = [] if (on := processor()) is None else list(self._units(on.rows))
        self.table = torch.tensor(units, dtype=torch.long).reshape(-1, UNIT)

    def _units(self, most: int) -> Iterator[tuple[int, ...]]:
        """Up to `most` rows each: the first, how many, the first of their ranks, how many, the work before them."""
        before = 0
        for ranks, start, stop in self.uses:
            tiles = -(-(stop - start) // most)
            edges = [start + (stop - start) * tile // tiles for tile in range(tiles + 1)]
            for first, last in itertools.pairwise(edges):
                # What lies apart in the tables is as good as several adapters; one thread adds them all.
                yield from ((first, last - first, row, count, before) for row, count in _stretches(ranks))
                before += len(ranks) * (last - first)


def _stretches(ranks: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs without a gap: the first of each, and how many."""
    found: list[tuple[int, int]] = []
    for rank in ranks:
        if found and sum(found[-1]) == rank:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((rank, 1))
    return found


def add(downs: Tensor, ups: Tensor, ends: Tensor, blocks: Blocks, x: Tensor, y: Tensor) -> None:
    """Adds to y [rows, out], of tables as thin.add has them; x [rows, in]."""
    linears, width = downs.shape[1:]
    if (on := processor()) is None:
        edges = [0, *ends.tolist()]
        for ranks, start, stop in blocks.uses:
            rows = torch.tensor(ranks)
            for linear, columns in enumerate(map(slice, edges, edges[1:])):
                low = torch.mm(x[start:stop], downs[rows, linear].t())
                y[start:stop, columns].addmm_(low, ups[rows, columns])
        return
    assert downs.is_contiguous()
    assert ups.is_contiguous()
    assert x.shape[1] == width
    assert y.shape[1] == ups.shape[1]
    assert x.stride(1) == y.stride(1) == 1
    _compiled(on, linears)(
        threads_for(blocks.work * (linears * width + y.shape[1])),
        blocks.table.data_ptr(),
        len(blocks.table),
        blocks.work,
        x.data_ptr(),
        NUMBER * x.stride(0),
        downs.data_ptr(),
        ups.data_ptr(),
        ends.data_ptr(),
        width,
        y.data_ptr(),
        NUMBER * y.stride(0),
        y.shape[1],
    )


class Writer:
    """Writes the kernel for stacks of so many linears."""

    def __init__(self, on: Processor, linears: int) -> None:
        self.on, self.linears, self.module = on, linears, new_module()
        self.group = max(1, on.rows // 3)  # rows of x whose sums along x are in registers at a time
        self.units = {count: self.unit(count * self.group) for count in range(1, -(-on.rows // self.group) + 1)}
        kinds = [LONG, LONG, ADDRESS, LONG, LONG, ADDRESS, LONG, *[ADDRESS] * 3, LONG, ADDRESS, LONG, LONG]
        f = Function(self.module, "share", kinds)
        b = f.builder
        thread, threads, table, count, work, x, x_step, downs, ups, ends, width, y, y_step, out = f.arguments
        first, last = (b.sdiv(b.mul(work, n), threads) for n in (thread, b.add(thread, long(1))))
        with f.loop(long(0), count) as (unit, _, _):
            start, rows, row, rank, before = (
                integer_at(b, table, b.add(b.mul(unit, long(UNIT)), long(n))) for n in range(UNIT)
            )
            with b.if_then(b.and_(b.icmp_signed(">=", before, first), b.icmp_signed("<", before, last))):
                a = at(b, downs, b.mul(row, b.mul(width, long(linears * NUMBER))))
                u = at(b, ups, b.mul(row, b.mul(out, long(NUMBER))))
                mine, target = at(b, x, b.mul(start, x_step)), at(b, y, b.mul(start, y_step))
                arguments = [rows, mine, x_step, a, u, rank, ends, width, target, y_step, out]
                call_for(f, self.units, parts_of(b, rows, self.group), arguments)
        in_threads(self.module, "add", f.end())

    def unit(self, tall: int) -> ir.Function:
        """Up to `tall` rows; where there are fewer, the last one is computed several times over."""
        kinds = [LONG, ADDRESS, LONG, ADDRESS, ADDRESS, LONG, ADDRESS, LONG, ADDRESS, LONG, LONG]
        f = Function(self.module, f"unit of {tall}", kinds)
        f.itself.attributes.add("noinline")
        b = f.builder
        rows, x, x_step, a, u, rank, ends, width, y, y_step, out = f.arguments
        low_step = (RANKS * self.linears + A_ROWS) * NUMBER
        low = scratch(b, tall * low_step)
        last = b.sub(rows, long(1))
        with f.loop(long(0), rank, RANKS) as (done, _, _):
            ranks = smaller(b, b.sub(rank, done), long(RANKS))
            here = at(b, a, b.mul(done, b.mul(width, long(self.linears * NUMBER))))
            self.down(f, (x, x_step, last, tall), (here, b.mul(ranks, long(self.linears))), width, (low, low_step))
            there = at(b, u, b.mul(done, b.mul(out, long(NUMBER))))
            with f.loop(long(0), long(self.linears), 1, [long(0)]) as (linear, (begin,), following):
                following[0] = end = integer_at(b, ends, linear)
                left = at(b, low, b.mul(linear, long(NUMBER))), long(low_step), long(self.linears * NUMBER)
                self.up(f, left, (there, b.mul(out, long(NUMBER))), ranks, (y, y_step, last, tall), (begin, end))
        return f.end()

    def down(
        self,
        f: Function,
        left: tuple[Any, Any, Any, int],
        right: tuple[Any, Any],
        width: Any,
        into: tuple[Any, int],
    ) -> None:
        """low [tall, ranks of all linears] = x A^T. left: x, its step, the last row, how many; right: A, its rows."""
        (x, x_step, last, tall), (a, count), (low, low_step), b = left, right, into, f.builder
        final, size = b.sub(count, long(1)), b.mul(width, long(NUMBER))
        with f.loop(long(0), count, A_ROWS) as (j, _, _):
            theirs = [at(b, a, b.mul(smaller(b, b.add(j, long(c)), final), size)) for c in range(A_ROWS)]
            with f.loop(long(0), long(tall), self.group) as (i, _, _):
                places = [b.add(i, long(r)) for r in range(self.group)]
                mine = [at(b, x, b.mul(smaller(b, place, last), x_step)) for place in places]
                totals = self.dots(f, mine, theirs, width)
                for r, place in enumerate(places):
                    target = at(b, low, b.add(b.mul(place, long(low_step)), b.mul(j, long(NUMBER))))
                    for c in range(A_ROWS):
                        b.store(totals[r * A_ROWS + c], at(b, target, long(c * NUMBER)), align=NUMBER)

    def dots(self, f: Function, mine: list[Any], theirs: list[Any], width: Any) -> list[Any]:
        """Every one of mine times every one of theirs, sums along `width` numbers."""
        b, begin, found = f.builder, long(0), list[Any]()
        for count, end in ((self.on.width, b.and_(width, long(-self.on.width))), (1, width)):
            v = Lanes(f, count)
            with f.loop(begin, end, count, [v.number(0.0)] * (len(mine) * len(theirs))) as (k, so_far, following):
                others = [v.load(other, k) for other in theirs]
                for r, own in enumerate(mine):
                    numbers = v.load(own, k)
                    for c, other in enumerate(others):
                        n = r * len(theirs) + c
                        following[n] = v.multiply_add(numbers, other, so_far[n])
            totals = [v.total(each) for each in so_far]
            found = [b.fadd(one, other) for one, other in zip(found, totals, strict=True)] if found else totals
            begin = end
        return found

    def up(
        self,
        f: Function,
        left: tuple[Any, Any, Any],
        right: tuple[Any, Any],
        ranks: Any,
        onto: tuple[Any, Any, Any, int],
        columns: tuple[Any, Any],
    ) -> None:
        """y [tall, columns] += low B. left, right: as `walk` says; onto: y, its step, the last row, how many."""
        (low, low_step, rank_step), (u, u_step) = left, right
        (y, y_step, last, tall), (begin, end), b = onto, columns, f.builder
        whole = b.add(begin, b.mul(b.sdiv(b.sub(end, begin), long(self.on.columns)), long(self.on.columns)))
        rows = [at(b, y, b.mul(smaller(b, long(i), last), y_step)) for i in range(tall)]
        with f.loop(begin, whole, self.on.columns) as (column, _, _):
            v = Lanes(f, self.on.width)
            places = [(row, b.add(column, long(n * self.on.width))) for row in rows for n in range(self.on.vectors)]
            sums = [v.load(row, i) for row, i in places]
            sums = walk(f, self.on, sums, left, (at(b, u, b.mul(column, long(NUMBER))), u_step), ranks)
            for total, (row, i) in zip(sums, places, strict=True):
                v.store(total, row, i)
        with f.loop(long(0), b.add(last, long(1))) as (row, _, _):  # what is left of the columns, less than a panel
            mine, factors = at(b, y, b.mul(row, y_step)), at(b, low, b.mul(row, low_step))

            def add(v: Lanes, i: Any) -> None:
                with f.loop(long(0), ranks, 1, [v.load(mine, i)]) as (rank, (so_far,), following):
                    factor = b.load(at(b, factors, b.mul(rank, rank_step)), typ=FLOAT, align=NUMBER)
                    number = v.load(at(b, u, b.mul(rank, u_step)), i)
                    following[0] = v.multiply_add(v.everywhere(factor), number, so_far)
                v.store(so_far, mine, i)

            along(f, self.on, whole, end, add)


@once
def _compiled(on: Processor, linears: int) -> Callable[..., None]:
    return compiled(Writer(on, linears).module, "add")
