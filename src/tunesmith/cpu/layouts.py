"""Matrices laid out in panels as wide as a tile, which is how products read them (cpu/tiles.py).

    turned   [rows, heads, width] -> [heads, panels of rows, width, columns]    a row in each column
    split    [rows, heads, width] -> [heads, panels of the width, rows, columns]

A turned last panel has any numbers in the columns beyond the last row; a split one is left as it was beyond the width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from torch import Tensor

from tunesmith.cpu.lanes import Lanes, along
from tunesmith.cpu.tiles import turned
from tunesmith.cpu.writing import (
    ADDRESS,
    FLOAT,
    LONG,
    NUMBER,
    Function,
    Processor,
    at,
    bits_of,
    compiled,
    given_number,
    in_threads,
    long,
    new_module,
    once,
    parts_of,
    share_of,
    smaller,
    threads_for,
)


def lay_out(on: Processor, how: str, x: Tensor, out: int, panel_bytes: int, times: float = 1.0) -> None:
    """x [rows, heads, width] * times, to the address `out` and on, a panel every `panel_bytes`.

    x is float32, a head's numbers side by side; the caller knows that there is room.
    """
    rows, heads, width = x.shape
    assert x.element_size() == NUMBER
    assert x.stride(2) == 1 or width <= 1
    place = x.data_ptr(), NUMBER * x.stride(0), NUMBER * x.stride(1)
    _compiled(on, how)(threads_for(x.numel()), *place, out, panel_bytes, rows, heads, width, bits_of(times))


@once
def _compiled(on: Processor, how: str) -> Callable[..., None]:
    return compiled(_module(on, how), how)


def _module(on: Processor, how: str) -> ir.Module:
    """Threads share the panels of all heads."""
    module = new_module()
    f = Function(module, "share", [LONG, LONG, ADDRESS, LONG, LONG, ADDRESS, LONG, LONG, LONG, LONG, LONG])
    b = f.builder
    thread, threads, x, step, head_step, out, panel_step, rows, heads, width, times = f.arguments
    panels = parts_of(b, rows if how == "turned" else width, on.columns)
    first, last = share_of(b, b.mul(heads, panels), thread, threads)
    with f.loop(first, last) as (unit, _, _):
        head, begin = b.sdiv(unit, panels), b.mul(b.srem(unit, panels), long(on.columns))
        source, target = at(b, x, b.mul(head, head_step)), at(b, out, b.mul(unit, panel_step))
        factor = given_number(b, times)
        if how == "turned":
            _turn(f, on, (source, step, begin, rows), width, target, factor)
        else:
            count = smaller(b, b.sub(width, begin), long(on.columns))
            _split(f, on, (at(b, source, b.mul(begin, long(NUMBER))), step, rows), count, target, factor)
    in_threads(module, how, f.end())
    return module


def _turn(
    f: Function,
    on: Processor,
    given: tuple[Any, Any, Any, Any],
    width: Any,
    target: Any,
    factor: Any,
) -> None:
    """One panel. `given`: where the head begins, the step from row to row, the first row, how many there are."""
    (source, step, begin, count), b, v = given, f.builder, Lanes(f, on.width)
    end, whole, line = b.sub(count, long(1)), b.and_(width, long(-on.width)), on.columns * NUMBER
    for top in range(0, on.columns, on.width):
        places = [smaller(b, b.add(begin, long(top + i)), end) for i in range(on.width)]
        rows = [at(b, source, b.mul(place, step)) for place in places]
        with f.loop(long(0), whole, on.width) as (left, _, _):
            for i, column in enumerate(turned(b, [v.load(row, left) for row in rows])):
                place = at(b, target, b.mul(b.add(left, long(i)), long(line)))
                v.store(b.fmul(column, v.everywhere(factor)), place, long(top))
        with f.loop(whole, width) as (left, _, _):
            place = at(b, target, b.mul(left, long(line)))
            for i, row in enumerate(rows):
                number = b.load(at(b, row, b.mul(left, long(NUMBER))), typ=FLOAT, align=NUMBER)
                b.store(b.fmul(number, factor), at(b, place, long((top + i) * NUMBER)), align=NUMBER)


def _split(
    f: Function,
    on: Processor,
    given: tuple[Any, Any, Any],
    count: Any,
    target: Any,
    factor: Any,
) -> None:
    """One panel. `given`: where it begins, the step from row to row, how many rows there are. `count`: its columns."""
    (source, step, rows), b = given, f.builder
    with f.loop(long(0), rows) as (row, _, _):
        here, into = at(b, source, b.mul(row, step)), at(b, target, b.mul(row, long(on.columns * NUMBER)))

        def write(v: Lanes, i: Any) -> None:
            v.store(b.fmul(v.load(here, i), v.everywhere(factor)), into, i)

        along(f, on, long(0), count, write)
