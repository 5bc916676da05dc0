"""Blocks of rows, each on an adapter of its own: one call a linear, whatever the ranks.

    y_l[rows] += (x[rows] A_l^T) B_l      A_l, B_l: an adapter's rows of the tables of all adapters' numbers

A block is cut into units of a few rows. A lies along x, so its product is of sums along both; B lies along y, and is
read as a panel of other products is. Where many adapters have a row or two each, reading the tables is what takes time:
every number that is needed is read once, and asked for ahead. 16 adapters of rank 25 are as much to read as a base of
135 million weights in its linears.
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
    LINE,
    LONG,
    NUMBER,
    Function,
    Processor,
    at,
    compiled,
    fetch,
    greater,
    in_threads,
    integer_at,
    long,
    new_module,
    once,
    parts_of,
    processor,
    share_of,
    smaller,
    threads_for,
)

A_ROWS = 4  # of A at a time
FIELDS = 6  # integers that say what a unit is
UNITS_A_THREAD = 4  # from which on every thread has units of its own
READ = 16  # rows that take as long to compute as the numbers to read, the first time
WHOLE, DOWN, UP = range(3)  # what a call does


class Blocks:
    """Which rows use which ranks."""

    def __init__(self, uses: Sequence[tuple[Sequence[int], int, int]]) -> None:
        """uses: an adapter's rows of the tables, ascending, and the first and one past the last row of x that use it;
        no two have a row of x in common."""
        self.uses = [use for use in uses if len(use[0])]
        self.work = sum(len(ranks) * (stop - start) for ranks, start, stop in self.uses)
        self.threads = torch.get_num_threads()  # that the units are given to
        self.room = 0  # numbers of x A^T, to a linear
        units = [] if (on := processor()) is None else list(self._units(on))
        self.table = torch.tensor(units, dtype=torch.long).reshape(-1, FIELDS)

    def _units(self, on: Processor) -> Iterator[tuple[int, ...]]:
        """First row, how many, the first of their ranks, how many, where x A^T is put, whose thread's they are."""
        found = [(use[0], *edges) for use in self.uses for edges in itertools.pairwise(_edges(on, *use[1:]))]
        costs = [
            len(ranks) * (_height(on, stop - start) + (0 if ranks is before else READ))
            for (ranks, start, stop), (before, *_) in zip(found, [((), 0, 0), *found], strict=False)
        ]
        busy, owners = [0] * self.threads, [0] * len(found)
        for unit in sorted(range(len(found)), key=costs.__getitem__, reverse=True):
            owners[unit] = thread = busy.index(min(busy))
            busy[thread] += costs[unit]
        for (ranks, start, stop), owner in zip(found, owners, strict=True):
            for row, count in _stretches(ranks):  # as good as several adapters; one thread adds them all
                yield start, stop - start, row, count, self.room, owner
                self.room += _height(on, stop - start) * -(-count // A_ROWS) * A_ROWS


def _edges(on: Processor, start: int, stop: int) -> list[int]:
    """Where rows are cut into units."""
    parts = -(-(stop - start) // on.rows)
    return [start + (stop - start) * part // parts for part in range(parts + 1)]


def _heights(on: Processor) -> list[int]:
    """For how many rows there are functions."""
    group = _group(on)
    return [*(1 << i for i in range((group - 1).bit_length())), *range(group, on.rows + 1, group)]


def _height(on: Processor, rows: int) -> int:
    return next(height for height in _heights(on) if height >= rows)


def _group(on: Processor) -> int:
    """Rows of x whose sums along x are in registers at a time."""
    return max(1, on.rows // 3)


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
    """Adds to y [rows, out]. downs [room, linears, in] and ups [room, out] are the tables, contiguous; ends [linears]
    int64, where each linear's columns end; x [rows, in]."""
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
    assert len(ends) == linears
    assert x.stride(1) == y.stride(1) == 1
    assert x.shape[1] == width
    assert y.shape[1] == ups.shape[1]
    low = x.new_empty(blocks.room * linears)
    units, threads = len(blocks.table), threads_for(blocks.work * (linears * width + y.shape[1]))
    each_its_own = threads == blocks.threads and units >= UNITS_A_THREAD * threads
    for what in (WHOLE,) if each_its_own else (DOWN, UP):
        _compiled(on)(
            threads,
            what,
            blocks.table.data_ptr(),
            units,
            x.data_ptr(),
            NUMBER * x.stride(0),
            downs.data_ptr(),
            ups.data_ptr(),
            ends.data_ptr(),
            linears,
            width,
            low.data_ptr(),
            y.data_ptr(),
            NUMBER * y.stride(0),
            y.shape[1],
        )


KINDS = [LONG, LONG, LONG, ADDRESS, LONG, ADDRESS, LONG, *[ADDRESS] * 3, LONG, LONG, ADDRESS, ADDRESS, LONG, LONG]


class Writer:
    """Writes the kernel for one processor."""

    def __init__(self, on: Processor) -> None:
        self.on, self.module, self.group = on, new_module(), _group(on)
        heights = {rows: _height(on, rows) for rows in range(1, on.rows + 1)}
        downs, ups = ({tall: write(tall) for tall in _heights(on)} for write in (self._down, self._up))
        f = Function(self.module, "share", KINDS)
        b, (thread, threads, what, table, count, x, x_step) = f.builder, f.arguments[:7]
        a, u, ends, linears, width, low, y, y_step, out = f.arguments[7:]
        whole = b.icmp_signed("==", what, long(WHOLE))
        with f.loop(long(0), count) as (unit, _, _):
            start, rows, row, ranks, place, owner = (
                integer_at(b, table, b.add(b.mul(unit, long(FIELDS)), long(n))) for n in range(FIELDS)
            )
            with b.if_then(b.or_(b.icmp_signed("==", owner, thread), b.not_(whole))):
                step = b.mul(b.mul(parts_of(b, ranks, A_ROWS), linears), long(A_ROWS * NUMBER))  # of a row of x A^T
                here = at(b, low, b.mul(b.mul(place, linears), long(NUMBER)))
                with b.if_then(b.icmp_signed("!=", what, long(UP))):
                    found, all_of_it = b.mul(ranks, linears), parts_of(b, b.mul(ranks, linears), A_ROWS)
                    some = self._cut(b, whole, all_of_it, thread, threads)
                    theirs = at(b, a, b.mul(b.mul(row, linears), b.mul(width, long(NUMBER))))
                    arguments = [rows, at(b, x, b.mul(start, x_step)), x_step, theirs, found, *some, width, here, step]
                    call_for(f, {n: downs[tall] for n, tall in heights.items()}, rows, arguments)
                with b.if_then(b.icmp_signed("!=", what, long(DOWN))):
                    edges = self._cut(b, whole, parts_of(b, out, on.columns), thread, threads)
                    some = [b.mul(edge, long(on.columns)) for edge in edges]
                    theirs = at(b, u, b.mul(row, b.mul(out, long(NUMBER))))
                    arguments = [rows, here, step, theirs, ranks, ends, linears, at(b, y, b.mul(start, y_step)), y_step]
                    call_for(f, {n: ups[tall] for n, tall in heights.items()}, rows, [*arguments, *some, out])
        in_threads(self.module, "add", f.end())

    def _cut(self, b: ir.IRBuilder, whole: Any, count: Any, thread: Any, threads: Any) -> list[Any]:
        """Of `count` parts a thread's first, and one past its last."""
        first, last = share_of(b, count, thread, threads)
        return [b.select(whole, long(0), first), b.select(whole, count, last)]

    def _down(self, tall: int) -> ir.Function:
        """low [tall, rows of A] = x A^T. Where there are fewer rows, the last one is computed several times over.

        rows, x, its step, A, how many rows it has, of groups of them the first and one past the last, their width, low
        and its step
        """
        f = Function(self.module, f"down of {tall}", [LONG, ADDRESS, LONG, ADDRESS, *[LONG] * 4, ADDRESS, LONG])
        f.itself.attributes.add("noinline")
        b, (rows, x, x_step, a, count, first, end, width, low, low_step) = f.builder, f.arguments
        last, final, size = b.sub(rows, long(1)), b.sub(count, long(1)), b.mul(width, long(NUMBER))
        group = min(tall, self.group)
        with f.loop(b.mul(first, long(A_ROWS)), b.mul(end, long(A_ROWS)), A_ROWS) as (j, _, _):
            theirs = [at(b, a, b.mul(smaller(b, b.add(j, long(c)), final), size)) for c in range(A_ROWS)]
            with f.loop(long(0), long(tall), group) as (i, _, _):
                places = [b.add(i, long(r)) for r in range(group)]
                mine = [at(b, x, b.mul(smaller(b, place, last), x_step)) for place in places]
                totals = self._dots(f, mine, theirs, width)
                for r, place in enumerate(places):
                    target = at(b, low, b.add(b.mul(place, low_step), b.mul(j, long(NUMBER))))
                    for c in range(A_ROWS):
                        b.store(totals[r * A_ROWS + c], at(b, target, long(c * NUMBER)), align=NUMBER)
        return f.end()

    def _dots(self, f: Function, mine: list[Any], theirs: list[Any], width: Any) -> list[Any]:
        """Every one of mine times every one of theirs, sums along `width` numbers."""
        b, begin, found = f.builder, long(0), list[Any]()
        following_rows = b.mul(width, long(A_ROWS))
        for count, end in ((self.on.width, b.and_(width, long(-self.on.width))), (1, width)):
            v = Lanes(f, count)
            with f.loop(begin, end, count, [v.number(0.0)] * (len(mine) * len(theirs))) as (k, so_far, following):
                others = [v.load(other, k) for other in theirs]
                if count > 1:
                    for other in theirs:
                        fetch(self.module, b, at(b, other, b.mul(b.add(k, following_rows), long(NUMBER))))
                for r, own in enumerate(mine):
                    numbers = v.load(own, k)
                    for c, other in enumerate(others):
                        n = r * len(theirs) + c
                        following[n] = v.multiply_add(numbers, other, so_far[n])
            totals = [v.total(each) for each in so_far]
            found = [b.fadd(one, other) for one, other in zip(found, totals, strict=True)] if found else totals
            begin = end
        return found

    def _up(self, tall: int) -> ir.Function:
        """y [tall, columns] += low B, of every linear.

        rows, low, its step, B, how many ranks, where linears end, how many, y, its step, the first column, one past the
        last, how many there are
        """
        kinds = [LONG, ADDRESS, LONG, ADDRESS, LONG, ADDRESS, LONG, ADDRESS, *[LONG] * 4]
        f = Function(self.module, f"up of {tall}", kinds)
        f.itself.attributes.add("noinline")
        b, (rows, low, low_step, u, ranks, ends, linears, y, y_step, first, stop, out) = f.builder, f.arguments
        u_step, rank_step, last = b.mul(out, long(NUMBER)), b.mul(linears, long(NUMBER)), b.sub(rows, long(1))
        places = [at(b, y, b.mul(smaller(b, long(i), last), y_step)) for i in range(tall)]
        with f.loop(long(0), linears, 1, [long(0)]) as (linear, (begin,), following):
            following[0] = end = integer_at(b, ends, linear)
            begin = greater(b, begin, first)
            end = greater(b, begin, smaller(b, end, stop))
            factors = at(b, low, b.mul(linear, long(NUMBER)))
            left = factors, low_step, rank_step
            whole = b.add(begin, b.mul(b.sdiv(b.sub(end, begin), long(self.on.columns)), long(self.on.columns)))
            with f.loop(begin, whole, self.on.columns) as (column, _, _):
                self._panel(f, places, left, (at(b, u, b.mul(column, long(NUMBER))), u_step), ranks, column)
            with f.loop(long(0), rows) as (row, _, _):  # what is left of the columns, less than a panel
                own, own_factors = at(b, y, b.mul(row, y_step)), at(b, factors, b.mul(row, low_step))

                def add(v: Lanes, i: Any, own: Any = own, factors: Any = own_factors) -> None:
                    with f.loop(long(0), ranks, 1, [v.load(own, i)]) as (rank, (so_far,), following):
                        factor = b.load(at(b, factors, b.mul(rank, rank_step)), typ=FLOAT, align=NUMBER)
                        number = v.load(at(b, u, b.mul(rank, u_step)), i)
                        following[0] = v.multiply_add(v.everywhere(factor), number, so_far)
                    v.store(so_far, own, i)

                along(f, self.on, whole, end, add)
        return f.end()

    def _panel(
        self, f: Function, rows: list[Any], left: tuple[Any, Any, Any], right: tuple[Any, Any], ranks: Any, column: Any
    ) -> None:
        """Some columns of y, whose `rows` begin there. left, right: as `walk` says."""
        b, v, (u, u_step), line = f.builder, Lanes(f, self.on.width), right, self.on.columns * NUMBER

        def ahead(k: Any) -> None:
            following = at(b, u, b.add(b.mul(k, u_step), long(line)))
            for part in range(0, line, LINE):
                fetch(self.module, b, at(b, following, long(part)))

        places = [(row, b.add(column, long(n * self.on.width))) for row in rows for n in range(self.on.vectors)]
        sums = walk(f, self.on, [v.load(row, i) for row, i in places], left, right, ranks, ahead=ahead)
        for total, (row, i) in zip(sums, places, strict=True):
            v.store(total, row, i)


@once
def _compiled(on: Processor) -> Callable[..., None]:
    return compiled(Writer(on).module, "add")
