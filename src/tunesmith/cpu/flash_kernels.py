"""The kernels of cpu/flash.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from tunesmith.cpu.lanes import Lanes, sum_along
from tunesmith.cpu.sight import FIELDS, GRAIN, PANEL, PIECE, ROWS
from tunesmith.cpu.tiles import NOWHERE, call_for, plus, store, tiles_of, walk
from tunesmith.cpu.writing import (
    ADDRESS,
    FLOAT,
    INT,
    LONG,
    NUMBER,
    Function,
    Processor,
    at,
    declare,
    given_number,
    in_threads,
    integer_at,
    long,
    new_module,
    number_at,
    parts_of,
    scratch,
    share_of,
    smaller,
)

LINE = PIECE * NUMBER  # bytes of a row of scores
ONE = long(NUMBER)  # the step to a number's neighbour
HIDDEN = -1e38  # the score of a key that a row does not see
LOWEST = -1e30  # of all scores so far, when there are none

MATRIX = [ADDRESS, LONG, LONG]  # [rows, heads, dim]: where it begins, the steps in bytes from row to row, head to head
SIGHT = [*[ADDRESS] * 7, LONG]
SIZES = [LONG] * 5


@dataclass(frozen=True)
class Matrix:
    """[rows, columns] of one head; steps in bytes from row to row, and along one."""

    start: Any
    step: Any
    along: Any = ONE

    @property
    def turned(self) -> Matrix:
        return Matrix(self.start, self.along, self.step)


@dataclass(frozen=True)
class Run:
    """Some of the keys that a block of rows sees, and which of its rows see any of them."""

    key: Any  # the first
    keys: Any
    row: Any  # the first, within the block
    rows: Any
    hides: Any  # whether some of the keys from some of the rows


def slim(on: Processor) -> Processor:
    """The same with tiles as wide as a panel of keys."""
    return on._replace(vectors=PANEL // on.width)


class Blocks:
    """What forward and backward share: blocks of rows against runs of keys, and products of their tiles."""

    def __init__(self, on: Processor, dim: int) -> None:
        assert GRAIN % on.rows == 0
        assert PANEL % on.width == 0
        assert dim % on.columns == 0
        self.on, self.dim, self.module = on, dim, new_module()
        self.line, self.size = on.columns * NUMBER, dim * NUMBER  # bytes of a tile's row, of a head
        self.slim = slim(on)
        self.tiles = {
            each.vectors: {rows: self._tile(each, rows) for rows in range(1, each.rows + 1)}
            for each in dict.fromkeys((on, self.slim))
        }

    def begin(self, kinds: list[ir.Type]) -> tuple[Any, Any, Any]:
        """The function of a thread: its arguments but those of SIGHT and SIZES, its number, and how many there are."""
        self.f = f = Function(self.module, "share", [LONG, LONG, *kinds, *SIGHT, *SIZES])
        self.b, self.v = f.builder, Lanes(f, self.on.width)
        own, rest = f.arguments[2 : 2 + len(kinds)], f.arguments[2 + len(kinds) :]
        self.order, self.places, *self.key_bounds, self.table, self.starts, self.blocks = rest[: len(SIGHT)]
        self.rows, self.heads, self.group, self.keys, bits = rest[len(SIGHT) :]
        self.scale, self.panels = given_number(self.b, bits), parts_of(self.b, self.keys, PANEL)
        return own, f.arguments[0], f.arguments[1]

    def _tile(self, on: Processor, rows: int) -> ir.Function:
        """y = x w + added: x [rows, inner], with steps from row to row and along one; w a panel; added is y or none."""
        name = f"tile of {rows}, {on.vectors}"
        f = Function(self.module, name, [ADDRESS, LONG, LONG, ADDRESS, LONG, LONG, ADDRESS, LONG, ADDRESS])
        f.itself.attributes.add("noinline")
        x, x_row, x_step, w, w_step, inner, y, y_step, added = f.arguments
        sums = [Lanes(f, on.width).number(0.0)] * (rows * on.vectors)
        sums = walk(f, on, sums, (x, x_row, x_step), (w, w_step), inner)
        store(f, on, plus(f, on, sums, added, y_step), y, y_step)
        return f.end()

    def multiply(self, on: Processor, x: Matrix, rows: Any, w: Matrix, inner: Any, y: Matrix, *, adds: bool) -> None:
        """y [rows, columns] = x w, or added to it: one panel's width."""
        f, b = self.f, self.b
        tiles = tiles_of(b, on, rows, x.step)
        with f.loop(long(0), tiles) as (tile, _, _):
            row, end = share_of(b, rows, tile, tiles)
            arguments = [at(b, x.start, b.mul(row, x.step)), x.step, x.along, w.start, w.step, inner]
            into = at(b, y.start, b.mul(row, y.step))
            arguments += [into, y.step, into if adds else NOWHERE]
            call_for(f, self.tiles[on.vectors], b.sub(end, row), arguments)

    def add_across(self, x: Matrix, rows: Any, w: Matrix, inner: Any, y: Matrix, panel: Any) -> None:
        """y [rows, dim] += x w: panel after panel, each `panel` bytes of w on."""
        b = self.b
        with self.f.loop(long(0), long(self.dim // self.on.columns)) as (i, _, _):
            here = Matrix(at(b, w.start, b.mul(i, panel)), w.step)
            into = Matrix(at(b, y.start, b.mul(i, long(self.line))), y.step)
            self.multiply(self.on, x, rows, here, inner, into, adds=True)

    def scores(self, x: Matrix, panels: Any, run: Run, into: Any) -> None:
        """A run's rows of x [rows of the block, dim] with each of its keys (or values), which lie turned."""
        b = self.b
        start = at(b, panels, b.mul(run.key, long(self.size)))
        x, into = self.rows_of(x, run), self.rows_of(Matrix(into, long(LINE)), run).start
        with self.f.loop(long(0), parts_of(b, run.keys, PANEL)) as (i, _, _):
            w = Matrix(at(b, start, b.mul(i, long(PANEL * self.size))), long(PANEL * NUMBER))
            y = Matrix(at(b, into, b.mul(i, long(PANEL * NUMBER))), long(LINE))
            self.multiply(self.slim, x, run.rows, w, long(self.dim), y, adds=False)

    def rows_of(self, x: Matrix, run: Run) -> Matrix:
        """Of a block's rows those of a run."""
        return Matrix(at(self.b, x.start, self.b.mul(run.row, x.step)), x.step)

    def runs(self, block: Any, work: Any) -> None:
        """work(run) for every run of keys that a block sees."""
        b = self.b
        begin, end = integer_at(b, self.starts, block), integer_at(b, self.starts, b.add(block, long(1)))
        with self.f.loop(begin, end) as (n, _, _):
            fields = [integer_at(b, self.table, b.add(b.mul(n, long(FIELDS)), long(i))) for i in range(FIELDS)]
            key, keys, row, rows, hides = fields
            work(Run(key, keys, row, rows, b.icmp_signed("!=", hides, long(0))))

    def each_row(self, first: Any, run: Run, work: Any) -> None:
        """work(row of the block, keys rounded up to panels, sees) for a run's rows; sees(i): of a vector's keys."""
        b = self.b
        width = b.mul(parts_of(b, run.keys, PANEL), long(PANEL))
        begins, ends, reach = (at(b, each, b.mul(run.key, long(4))) for each in self.key_bounds)

        def rows(*, hides: bool) -> None:
            with self.f.loop(run.row, b.add(run.row, run.rows)) as (row, _, _):
                order, place = (
                    self.v.everywhere(b.load(at(b, a, b.mul(b.add(first, row), long(4))), typ=INT, align=4))
                    for a in (self.order, self.places)
                )

                def sees(i: Any) -> Any:
                    from_, until, reaches = (
                        b.load(at(b, a, b.mul(i, long(4))), typ=self.v.whole, align=4) for a in (begins, ends, reach)
                    )
                    inside = b.and_(b.icmp_signed("<=", from_, order), b.icmp_signed(">", until, order))
                    return b.and_(inside, b.icmp_signed(">", reaches, place))

                work(row, width, sees if hides else None)

        with b.if_else(run.hides) as (some, none):
            with some:
                rows(hides=True)
            with none:
                rows(hides=False)

    def block_of(self, block: Any) -> tuple[Any, Any]:
        """Its first row, and how many it has."""
        b = self.b
        first = b.mul(block, long(ROWS))
        return first, smaller(b, b.sub(self.rows, first), long(ROWS))

    def matrix(self, given: tuple[Any, Any, Any], row: Any, head: Any) -> Matrix:
        start, step, head_step = given
        b = self.b
        return Matrix(at(b, start, b.add(b.mul(row, step), b.mul(head, head_step))), step)

    def put(self, number: Any, numbers: Any, i: Any) -> None:
        self.b.store(number, at(self.b, numbers, self.b.mul(i, long(NUMBER))), align=NUMBER)


class Forward(Blocks):
    """Threads share the blocks of all heads."""

    def __init__(self, on: Processor, dim: int) -> None:
        super().__init__(on, dim)
        self.shrink = self._shrink()
        own, thread, threads = self.begin([*MATRIX, ADDRESS, ADDRESS, ADDRESS, LONG, ADDRESS, LONG])
        query, (self.turned, self.split, self.out, self.out_step, self.lse, goes_on) = own[:3], own[3:]
        b = self.b
        self.goes_on = b.icmp_signed("!=", goes_on, long(0))
        self.s, self.sums = scratch(b, ROWS * LINE), scratch(b, ROWS * self.size)
        # Of each row: its largest score up to here, and with the run at hand; what is kept of its sums; their divisor.
        self.largest, self.tops, self.kept, self.totals = (scratch(b, (ROWS + on.width) * NUMBER) for _ in range(4))
        first, last = share_of(b, b.mul(self.heads, self.blocks), thread, threads)
        with self.f.loop(first, last) as (unit, _, _):
            self.block(query, b.sdiv(unit, self.blocks), b.srem(unit, self.blocks))
        in_threads(self.module, "forward", self.f.end())

    def block(self, query: Any, head: Any, block: Any) -> None:
        b, v = self.b, self.v
        first, count = self.block_of(block)
        kv_head, q = b.sdiv(head, self.group), self.matrix(query, first, head)
        turned = at(b, self.turned, b.mul(kv_head, b.mul(self.panels, long(PANEL * self.size))))
        split = at(b, self.split, b.mul(kv_head, b.mul(self.keys, long(self.size))))
        with self.f.loop(long(0), count) as (row, _, _):
            out, lse, sums = self.places_of(row, b.add(first, row), head)
            with b.if_else(self.goes_on) as (more, new):
                with more:  # what was summed up to here counts as one key, whose score is the log-sum-exp
                    self.start(row, number_at(b, lse, long(0)), 1.0, sums, lambda i: v.load(out, long(i)))
                with new:
                    self.start(row, ir.Constant(FLOAT, LOWEST), 0.0, sums, lambda _: v.number(0.0))

        def add(run: Run) -> None:
            self.scores(q, turned, run, self.s)
            self.weigh(first, run)
            values = Matrix(at(b, split, b.mul(run.key, long(self.line))), long(self.line))
            weights, sums = (
                self.rows_of(Matrix(*each), run) for each in ((self.s, long(LINE)), (self.sums, long(self.size)))
            )
            self.add_across(weights, run.rows, values, run.keys, sums, b.mul(self.keys, long(self.line)))

        self.runs(block, add)
        with self.f.loop(long(0), count) as (row, _, _):
            self.finish(row, b.add(first, row), head)

    def places_of(self, row: Any, place: Any, head: Any) -> tuple[Any, Any, Any]:
        """Where a row's output, its log-sum-exp and its sums are."""
        b = self.b
        out = at(b, self.out, b.add(b.mul(place, self.out_step), b.mul(head, long(self.size))))
        lse = at(b, self.lse, b.mul(b.add(b.mul(place, self.heads), head), long(NUMBER)))
        return out, lse, at(b, self.sums, b.mul(row, long(self.size)))

    def start(self, row: Any, largest: Any, total: float, sums: Any, number: Callable[[int], Any]) -> None:
        for numbers in (self.largest, self.tops):  # the same but for a run's rows while it is weighed
            self.put(largest, numbers, row)
        self.put(ir.Constant(FLOAT, total), self.totals, row)
        for i in range(0, self.dim, self.on.width):
            self.v.store(number(i), sums, long(i))

    def weigh(self, first: Any, run: Run) -> None:
        """A run's scores become exponentials; what was summed before is made smaller where there is a larger score.

        In three turns over the rows: in one turn a row's largest score, its exponential and its sum would wait for each
        other.
        """
        b = self.b
        self.each_row(first, run, self.find_largest)
        places = [at(b, numbers, b.mul(run.row, long(NUMBER))) for numbers in (self.largest, self.tops, self.kept)]
        b.call(self.shrink, [*places, run.rows])
        self.each_row(first, run, self.raise_to_powers)

    def _shrink(self) -> ir.Function:
        """kept = exp(largest - tops), and largest = tops, of so many rows and as many more as a vector has."""
        f = Function(self.module, "shrink", [ADDRESS, ADDRESS, ADDRESS, LONG])
        f.itself.attributes.add("noinline")
        v, (largest, tops, kept, rows) = Lanes(f, self.on.width), f.arguments
        with f.loop(long(0), rows, self.on.width) as (row, _, _):
            top = v.load(tops, row)
            v.store(v.exp(f.builder.fsub(v.load(largest, row), top)), kept, row)
            v.store(top, largest, row)
        return f.end()

    def find_largest(self, row: Any, width: Any, sees: Any) -> None:
        b, v = self.b, self.v
        s, scale = at(b, self.s, b.mul(row, long(LINE))), v.everywhere(self.scale)
        with self.f.loop(long(0), width, self.on.width, [v.number(HIDDEN)]) as (i, so_far, following):
            score = b.fmul(v.load(s, i), scale)
            if sees is not None:
                score = b.select(sees(i), score, v.number(HIDDEN))
            v.store(score, s, i)
            following[0] = b.select(b.fcmp_ordered(">", score, so_far[0]), score, so_far[0])
        before, here = number_at(b, self.largest, row), v.largest(so_far[0])
        self.put(b.select(b.fcmp_ordered(">", before, here), before, here), self.tops, row)

    def raise_to_powers(self, row: Any, width: Any, sees: Any) -> None:
        b, v = self.b, self.v
        s, largest, kept = (
            at(b, self.s, b.mul(row, long(LINE))),
            number_at(b, self.tops, row),
            number_at(b, self.kept, row),
        )
        top, nothing = v.everywhere(largest), v.number(0.0)
        with self.f.loop(long(0), width, self.on.width, [nothing]) as (i, so_far, following):
            score = v.load(s, i)
            power = v.exp(b.fsub(score, top))
            if sees is not None:
                power = b.select(b.fcmp_ordered(">", score, v.number(LOWEST)), power, nothing)
            v.store(power, s, i)
            following[0] = b.fadd(so_far[0], power)
        total = b.fmul(number_at(b, self.totals, row), kept)
        self.put(b.fadd(total, v.total(so_far[0])), self.totals, row)
        sums = at(b, self.sums, b.mul(row, long(self.size)))
        with b.if_then(b.fcmp_unordered("!=", kept, ir.Constant(FLOAT, 1.0))):
            for i in range(0, self.dim, self.on.width):
                v.store(b.fmul(v.load(sums, long(i)), v.everywhere(kept)), sums, long(i))

    def finish(self, row: Any, place: Any, head: Any) -> None:
        b, v = self.b, self.v
        total = number_at(b, self.totals, row)
        log = b.call(declare(self.module, "llvm.log.f32", [FLOAT], FLOAT), [total])
        factor = v.everywhere(b.fdiv(ir.Constant(FLOAT, 1.0), total))
        out, lse, sums = self.places_of(row, place, head)
        self.put(b.fadd(number_at(b, self.largest, row), log), lse, long(0))
        for i in range(0, self.dim, self.on.width):
            v.store(b.fmul(v.load(sums, long(i)), factor), out, long(i))


class Backward(Blocks):
    """Threads share the groups of heads that read the same keys, each cut into so many parts. A part has gradients of
    keys and values of its own, [kv_heads, parts, keys, dim], zeros before."""

    def __init__(self, on: Processor, dim: int) -> None:
        super().__init__(on, dim)
        kinds = [*MATRIX, *MATRIX, ADDRESS, LONG, *[ADDRESS] * 4, *MATRIX, ADDRESS, ADDRESS, LONG]
        own, thread, threads = self.begin(kinds)
        self.query, self.d_out, self.d_query = own[:3], own[3:6], own[12:15]
        self.out, self.out_step, self.lse, self.turned_keys, self.turned_values, self.split_keys = own[6:12]
        self.d_key, self.d_value, parts = own[15:]
        b = self.b
        self.s, self.t = scratch(b, ROWS * LINE), scratch(b, ROWS * LINE)
        self.dots = scratch(b, ROWS * NUMBER)
        first, last = share_of(b, b.mul(b.sdiv(self.heads, self.group), parts), thread, threads)
        with self.f.loop(first, last) as (unit, _, _):
            before = b.mul(b.sdiv(unit, parts), self.group)
            begin, end = (b.add(before, edge) for edge in share_of(b, self.group, b.srem(unit, parts), parts))
            with self.f.loop(begin, end) as (head, _, _), self.f.loop(long(0), self.blocks) as (block, _, _):
                self.block(unit, head, block)
        in_threads(self.module, "backward", self.f.end())

    def block(self, unit: Any, head: Any, block: Any) -> None:
        b = self.b
        first, count = self.block_of(block)
        kv_head = b.sdiv(head, self.group)
        q, d_out, d_query = (self.matrix(given, first, head) for given in (self.query, self.d_out, self.d_query))
        panels = b.mul(kv_head, b.mul(self.panels, long(PANEL * self.size)))
        keys, values = at(b, self.turned_keys, panels), at(b, self.turned_values, panels)
        split = at(b, self.split_keys, b.mul(kv_head, b.mul(self.keys, long(self.size))))
        self.products(first, count, head, d_out, d_query)

        def add(run: Run) -> None:
            self.scores(q, keys, run, self.s)
            self.scores(d_out, values, run, self.t)
            self.each_row(first, run, lambda *row: self.slopes(first, head, *row))
            s, t = (self.rows_of(Matrix(each, long(LINE)), run) for each in (self.s, self.t))
            mine = b.mul(b.add(b.mul(unit, self.keys), run.key), long(self.size))
            for weights, of, grad in ((s, d_out, self.d_value), (t, q, self.d_key)):
                into = Matrix(at(b, grad, mine), long(self.size))
                self.add_across(weights.turned, run.keys, self.rows_of(of, run), run.rows, into, long(self.line))
            w = Matrix(at(b, split, b.mul(run.key, long(self.line))), long(self.line))
            panel = b.mul(self.keys, long(self.line))
            self.add_across(t, run.rows, w, run.keys, self.rows_of(d_query, run), panel)

        self.runs(block, add)

    def products(self, first: Any, count: Any, head: Any, d_out: Matrix, d_query: Matrix) -> None:
        """A row's output times its gradient: the sum that softmax's derivative takes off (FlashAttention, 3.1). Where
        the gradient of its query is added up becomes zero."""
        b = self.b
        out = self.matrix((self.out, self.out_step, long(self.size)), first, head)
        with self.f.loop(long(0), count) as (row, _, _):
            x, y = (at(b, each.start, b.mul(row, each.step)) for each in (out, d_out))
            dot = sum_along(
                self.f, self.on, long(self.dim), lambda v, i, s: v.multiply_add(v.load(x, i), v.load(y, i), s)
            )
            self.put(dot, self.dots, row)
            for i in range(0, self.dim, self.on.width):
                self.v.store(self.v.number(0.0), at(b, d_query.start, b.mul(row, d_query.step)), long(i))

    def slopes(self, first: Any, head: Any, row: Any, width: Any, sees: Any) -> None:
        """A row's scores become probabilities, and its gradients by those the gradients by its products with keys."""
        b, v = self.b, self.v
        s, t = (at(b, each, b.mul(row, long(LINE))) for each in (self.s, self.t))
        place = b.add(b.mul(b.add(first, row), self.heads), head)
        lse, dot = v.everywhere(number_at(b, self.lse, place)), v.everywhere(number_at(b, self.dots, row))
        scale = v.everywhere(self.scale)
        with self.f.loop(long(0), width, self.on.width) as (i, _, _):
            power = v.exp(b.fsub(b.fmul(v.load(s, i), scale), lse))
            if sees is not None:
                power = b.select(sees(i), power, v.number(0.0))
            v.store(power, s, i)
            v.store(b.fmul(b.fmul(power, scale), b.fsub(v.load(t, i), dot)), t, i)
