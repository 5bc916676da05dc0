"""Products of matrices as kernels: a tile of the result stays in registers while one walks along the inner dimension.

The way of BLIS (Van Zee and van de Geijn 2015, doi:10.1145/2764454). A matrix W lies in panels as wide as a tile, in
the order in which they are read: [panels, in, columns]. What general libraries don't do, because they serve all
shapes: W is laid out once for both directions, few rows have tiles of their own, and while one panel is worked on the
next is fetched from memory.

Every number of a result is one sum, in the same order whatever else is computed: a row's result does not depend on how
many rows there are, on the tile it falls into, or on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from llvmlite import ir

from tunesmith.cpu.lanes import Lanes
from tunesmith.cpu.writing import (
    ADDRESS,
    BYTE,
    FLOAT,
    INT,
    LINE,
    LONG,
    NUMBER,
    Function,
    Processor,
    at,
    fetch,
    in_threads,
    integer_at,
    is_there,
    long,
    new_module,
    parts_of,
    scratch,
    share_of,
)

# Products of vectors in a loop's body: of more, LLVM loads numbers so early that sums no longer fit into the registers.
BODY = 24
DEPTH = 1024  # of the inner dimension, that a panel turned over has at a time: it stays in the second cache
NOWHERE = ir.Constant(ADDRESS, None)
PAGE, WAYS = 4096, 8  # memory so far apart falls on the same lines of the first cache, which keeps so many of it


class Kind(Enum):
    """Which product of x [rows, in] and W [out, in]."""

    FORWARD = "x W^T"
    INTEGERS = "x W^T, of W in int8 and a scale for each of its rows"
    BACK = "x W, with x [rows, out]"


@dataclass(frozen=True)
class Given:
    """A product's arguments in a kernel: addresses, steps in bytes from row to row, sizes."""

    x: Any
    x_step: Any
    w: Any
    w_step: Any  # from panel to panel
    inner: Any
    h: Any
    h_step: Any
    u: Any
    thin: Any
    bands: Any  # of u's panels the columns that are not zero, from and to; or nowhere
    y: Any
    y_step: Any
    added: Any
    added_step: Any
    bias: Any
    scale: Any
    rows: Any
    width: Any
    split_rows: Any  # not 0: threads share the rows, else the panels


KINDS = [ADDRESS, LONG, ADDRESS, LONG, LONG, ADDRESS, LONG, ADDRESS, LONG, ADDRESS, ADDRESS, LONG, ADDRESS, LONG]
KINDS += [ADDRESS, ADDRESS, LONG, LONG, LONG]
TILE_KINDS = [ADDRESS, LONG, ADDRESS, LONG, ADDRESS, LONG, ADDRESS, LONG, ADDRESS, LONG, ADDRESS, LONG]
TILE_KINDS += [ADDRESS, ADDRESS, ADDRESS, LONG]


def walk(
    f: Function,
    on: Processor,
    sums: list[Any],
    left: tuple[Any, Any, Any],
    right: tuple[Any, Any],
    inner: Any,
    *,
    weigh: Callable[[Lanes, Any, Any], Any] = Lanes.load,
    ahead: Callable[[Any], None] | None = None,
) -> list[Any]:
    """sums + left * right, `inner` steps along: what every product of matrices here is made of.

    left   where x begins, the step in bytes from row to row, and along a row
    right  where a panel of w begins, and the step from one of its rows to the next
    weigh  reads a vector of w, told its row's address and the vector's first column
    ahead  is told every step
    """
    (x, x_row, x_step), (w, w_step), b = left, right, f.builder
    count, v = len(sums) // on.vectors, Lanes(f, on.width)
    unrolled = 1 << (max(1, BODY // len(sums)).bit_length() - 1)  # steps between two looks at the end
    whole = b.and_(inner, long(-unrolled))
    starts = [at(b, x, b.mul(x_row, long(row))) for row in range(count)]
    for start, stop, turns in ((long(0), whole, unrolled), (whole, inner, 1)):
        with f.loop(start, stop, turns, sums) as (k, results, following):
            place = at(b, w, b.mul(k, w_step))
            rows = [at(b, each, b.mul(k, x_step)) for each in starts]
            for turn in range(turns):
                weights = [weigh(v, place, long(on.width * vector)) for vector in range(on.vectors)]
                if ahead is not None:
                    ahead(b.add(k, long(turn)))
                for row, address in enumerate(rows):
                    number = b.load(at(b, address, b.mul(x_step, long(turn))), typ=FLOAT, align=NUMBER)
                    everywhere = v.everywhere(number)
                    for vector in range(on.vectors):
                        i = row * on.vectors + vector
                        following[i] = v.multiply_add(everywhere, weights[vector], following[i])
                place = at(b, place, w_step)
        sums = list(results)
    return sums


def _integers(v: Lanes, place: Any, first: Any) -> Any:
    small = v.b.load(at(v.b, place, first), typ=ir.VectorType(BYTE, v.count), align=1)
    return v.b.sitofp(small, v.kind)


def plus(f: Function, on: Processor, sums: list[Any], place: Any, step: Any) -> list[Any]:
    """A tile's sums + what lies at `place`, row by row; nothing where that is nowhere."""
    b, before, v = f.builder, f.builder.block, Lanes(f, on.width)
    more: list[Any] = []
    with b.if_then(is_there(b, place)):
        for i, total in enumerate(sums):
            row, vector = divmod(i, on.vectors)
            more.append(b.fadd(total, v.load(at(b, place, b.mul(step, long(row))), long(on.width * vector))))
        then = b.block
    return [f.either((total, before), (other, then)) for total, other in zip(sums, more, strict=True)]


def store(f: Function, on: Processor, sums: list[Any], place: Any, step: Any) -> None:
    """Write a tile's sums, row by row."""
    for i, total in enumerate(sums):
        row, vector = divmod(i, on.vectors)
        Lanes(f, on.width).store(total, at(f.builder, place, f.builder.mul(step, long(row))), long(on.width * vector))


def turned(b: ir.IRBuilder, square: list[Any]) -> list[Any]:
    """The vectors of a square matrix's columns, from those of its rows: by interleaving them."""
    width = len(square)

    def interleaved(one: Any, other: Any, start: int) -> Any:
        """one[start], other[start], one[start + 1], other[start + 1], ..."""
        order = [number for i in range(start, start + width // 2) for number in (i, i + width)]
        return b.shuffle_vector(one, other, ir.Constant(ir.VectorType(INT, width), order))

    for _ in range(width.bit_length() - 1):
        pairs = zip(square[: width // 2], square[width // 2 :], strict=True)
        square = [interleaved(*pair, half) for pair in pairs for half in (0, width // 2)]
    return square


def tiles_of(b: ir.IRBuilder, on: Processor, rows: Any, step: Any) -> Any:
    """Into how many tiles rows fall that lie `step` bytes apart: of such as share lines of the first cache no more to a
    tile than it keeps, else every number would be fetched anew."""
    most = long(on.rows)
    for apart, fit in ((PAGE // 2, 2 * WAYS), (PAGE, WAYS)):
        if fit < on.rows:
            shared = b.icmp_signed("==", b.and_(step, long(apart - 1)), long(0))
            most = b.select(shared, long(fit), most)
    return b.sdiv(b.add(rows, b.sub(most, long(1))), most)


def call_for(f: Function, functions: Mapping[int, ir.Function], count: Any, arguments: list[Any]) -> None:
    """Call the one of the functions that is for so many."""
    b, done = f.builder, f.itself.append_basic_block()
    choice = b.switch(count, done)
    for number, function in functions.items():
        case = f.itself.append_basic_block()
        choice.add_case(long(number), case)
        b.position_at_end(case)
        b.call(function, arguments)
        b.branch(done)
    b.position_at_end(done)


class Tiles:
    """The functions of one kind of product for one processor."""

    def __init__(self, on: Processor, kind: Kind) -> None:
        self.on, self.kind = on, kind
        self.integers = kind is Kind.INTEGERS
        self.module = new_module()
        self.vector = ir.VectorType(FLOAT, on.width)
        self.line = on.columns * NUMBER  # bytes of a tile's row
        self.panel_step = on.columns if self.integers else self.line  # from one row of a panel to the next
        self.tiles = {rows: self._tile(rows) for rows in range(1, on.rows + 1)}
        in_threads(self.module, "product", self._share())

    def _tile(self, rows: int) -> ir.Function:
        """One tile of y, all of x's inner dimension and all of h's. `ahead` is fetched, `ahead_step` on at every step.

        Arguments: as the first line below names them, then `ahead` and `ahead_step`.
        """
        f = Function(self.module, f"tile of {rows}", TILE_KINDS)
        f.itself.attributes.add("noinline")
        b, v = f.builder, Lanes(f, self.on.width)
        x, x_step, w, inner, h, h_step, u, thin, y, y_step, added, added_step, bias, scale, next_, next_step = (
            f.arguments
        )

        def ahead(k: Any) -> None:
            line = at(b, next_, b.mul(k, next_step))
            for part in range(0, self.panel_step, LINE):
                fetch(self.module, b, at(b, line, long(part)))

        sums = [v.number(0.0)] * (rows * self.on.vectors)
        left, right = (x, x_step, long(NUMBER)), (w, long(self.panel_step))
        weigh = _integers if self.integers else Lanes.load
        sums = walk(f, self.on, sums, left, right, inner, weigh=weigh, ahead=ahead)
        if self.integers:
            sums = [b.fmul(s, v.load(scale, long(self.on.width * (i % self.on.vectors)))) for i, s in enumerate(sums)]
        sums = walk(f, self.on, sums, (h, h_step, long(NUMBER)), (u, long(self.line)), thin)
        store(f, self.on, plus(f, self.on, plus(f, self.on, sums, bias, long(0)), added, added_step), y, y_step)
        return f.end()

    def _share(self) -> ir.Function:
        """One thread's share of y: of its panels, or of its rows."""
        f = Function(self.module, "share", [LONG, LONG, *KINDS])
        b, given = f.builder, Given(*f.arguments[2:])
        spare = scratch(b, self.on.rows * self.line)
        turned = scratch(b, DEPTH * self.line) if self.kind is Kind.BACK else None
        panels = parts_of(b, given.width, self.on.columns)
        by_rows = b.icmp_signed("!=", given.split_rows, long(0))
        thread, threads = f.arguments[:2]

        def cut(whole: Any, here: Any) -> tuple[Any, Any]:
            first, last = share_of(b, whole, thread, threads)
            return b.select(here, first, long(0)), b.select(here, last, whole)

        rows, (first, last) = cut(given.rows, by_rows), cut(panels, b.not_(by_rows))
        with f.loop(first, last) as (panel, _, _):
            if turned is not None:
                self._turned_panel(f, given, rows, panel, turned, spare)
            else:
                w = at(b, given.w, b.mul(panel, given.w_step))
                self._panel(f, replace(given, w=w), rows, panel, at(b, w, given.w_step), spare)
        return f.end()

    def _turned_panel(self, f: Function, given: Given, rows: Any, panel: Any, turned: Any, spare: Any) -> None:
        """A panel of y = x W: W's own panels hold what it needs as blocks of [columns, columns], which are transposed
        DEPTH of them at a time."""
        b, columns = f.builder, self.on.columns
        start = at(b, given.w, b.mul(panel, long(columns * self.line)))
        with f.loop(long(0), given.inner, DEPTH) as (done, _, _):
            left = b.sub(given.inner, done)
            last = b.icmp_signed("<=", left, long(DEPTH))
            inner = b.select(last, left, long(DEPTH))
            blocks = parts_of(b, inner, columns)
            with f.loop(long(0), blocks) as (block, _, _):
                source = at(b, start, b.mul(b.add(b.sdiv(done, long(columns)), block), given.w_step))
                for row in range(columns):  # of the block after the next
                    fetch(self.module, b, at(b, source, b.add(b.mul(given.w_step, long(2)), long(row * self.line))))
                self._turn(b, source, at(b, turned, b.mul(block, long(columns * self.line))))
            begun = b.icmp_signed(">", done, long(0))
            part = replace(
                given,
                x=at(b, given.x, b.mul(done, long(NUMBER))),
                w=turned,
                inner=inner,
                thin=b.select(last, given.thin, long(0)),
                added=b.select(begun, given.y, given.added),
                added_step=b.select(begun, given.y_step, given.added_step),
            )
            self._panel(f, part, rows, panel, turned, spare)

    def _turn(self, b: ir.IRBuilder, source: Any, target: Any) -> None:
        """Transpose a block of [columns, columns]: squares of a vector's width, each by interleaving its rows."""
        width = self.on.width
        for top in range(0, self.on.columns, width):
            for left in range(0, self.on.columns, width):
                rows = [self._place(b, source, top + i, left) for i in range(width)]
                square = turned(b, [b.load(row, typ=self.vector, align=NUMBER) for row in rows])
                for i, row in enumerate(square):
                    b.store(row, self._place(b, target, left + i, top), align=NUMBER)

    def _place(self, b: ir.IRBuilder, block: Any, row: int, column: int) -> Any:
        return at(b, block, long(row * self.line + column * NUMBER))

    def _panel(self, f: Function, given: Given, rows: Any, panel: Any, following: Any, spare: Any) -> None:
        """All tiles of a panel of y, for rows [first, last). `following` is fetched meanwhile."""
        b, columns, (first, last) = f.builder, self.on.columns, rows
        mine = b.sub(last, first)
        tiles = tiles_of(b, self.on, mine, given.x_step)
        ahead_step = long(0)
        if self.kind is not Kind.BACK:
            some = b.select(b.icmp_signed(">", tiles, long(0)), tiles, long(1))
            ahead_step = b.add(b.sdiv(long(self.panel_step), some), long(1))
        byte = b.mul(panel, long(self.line))
        own = b.sub(given.width, b.mul(panel, long(columns)))  # columns left; the last panel may be cut off
        cut_off = b.icmp_signed("<", own, long(columns))
        first_rank, thin = self._band(f, given, panel)
        h = at(b, given.h, b.mul(first_rank, long(NUMBER)))
        u = at(b, given.u, b.mul(b.add(b.mul(panel, given.thin), first_rank), long(self.line)))
        bias = b.select(is_there(b, given.bias), at(b, given.bias, byte), NOWHERE)
        adds = b.and_(is_there(b, given.added), b.not_(cut_off))
        if self.panel_step > LINE:  # a tile alone: the processor foresees better what it reads
            alone = b.icmp_signed("<=", tiles, long(1))
            following = b.select(alone, given.w, following)
            ahead_step = b.select(alone, long(0), ahead_step)
        with f.loop(long(0), tiles) as (tile, _, _):
            row, end = (b.add(first, edge) for edge in share_of(b, mine, tile, tiles))
            y = at(b, at(b, given.y, b.mul(row, given.y_step)), byte)
            added = at(b, at(b, given.added, b.mul(row, given.added_step)), byte)
            arguments = [at(b, given.x, b.mul(row, given.x_step)), given.x_step, given.w, given.inner]
            arguments += [at(b, h, b.mul(row, given.h_step)), given.h_step, u, thin]
            arguments += [b.select(cut_off, spare, y), b.select(cut_off, long(self.line), given.y_step)]
            arguments += [b.select(adds, added, NOWHERE), given.added_step, bias, at(b, given.scale, byte)]
            arguments += [at(b, following, b.mul(b.mul(given.inner, ahead_step), tile)), ahead_step]
            call_for(f, self.tiles, b.sub(end, row), arguments)
            with b.if_then(cut_off, likely=False):
                self._copy(f, replace(given, y=y, added=added), is_there(b, given.added), spare, b.sub(end, row), own)

    def _band(self, f: Function, given: Given, panel: Any) -> tuple[Any, Any]:
        """The first of h's columns that a panel is multiplied with, and how many."""
        b, before = f.builder, f.builder.block
        with b.if_then(is_there(b, given.bands)):
            first, end = (integer_at(b, given.bands, b.add(b.mul(panel, long(2)), long(side))) for side in (0, 1))
            count, then = b.sub(end, first), b.block
        return f.either((long(0), before), (first, then)), f.either((given.thin, before), (count, then))

    def _copy(self, f: Function, given: Given, adds: Any, spare: Any, rows: Any, columns: Any) -> None:
        """What of a tile lies within y, from the memory into which it was written."""
        b = f.builder
        with f.loop(long(0), rows) as (row, _, _), f.loop(long(0), columns) as (column, _, _):
            byte = b.mul(column, long(NUMBER))
            number = b.load(at(b, spare, b.add(b.mul(row, long(self.line)), byte)), typ=FLOAT, align=NUMBER)
            target = at(b, given.y, b.add(b.mul(row, given.y_step), byte))
            with b.if_else(adds) as (then, otherwise):
                with then:
                    place = at(b, given.added, b.add(b.mul(row, given.added_step), byte))
                    b.store(b.fadd(number, b.load(place, typ=FLOAT, align=NUMBER)), target, align=NUMBER)
                with otherwise:
                    b.store(number, target, align=NUMBER)
