"""Products of which one side is an adapter's rank, of matrices as they lie.

A tile is one vector wide and sixteen rows tall: where it holds the whole rank every number of the wide matrix is read
once, and what is left at the end of a row is a vector of which some places are not read. That takes processors on which
this costs nothing (AVX-512); on others PyTorch's products are faster (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from tunesmith.cpu.lanes import Lanes
from tunesmith.cpu.layouts import lay_out
from tunesmith.cpu.tiles import call_for, tiles_of, walk
from tunesmith.cpu.writing import (
    ADDRESS,
    LONG,
    NUMBER,
    Function,
    Processor,
    at,
    bits_of,
    compiled,
    fetch,
    given_number,
    in_threads,
    long,
    new_module,
    once,
    parts_of,
    processor,
    share_of,
    threads_for,
)

TILE = Processor(width=16, rows=16, vectors=1)
KINDS = [ADDRESS, LONG, LONG, ADDRESS, LONG, LONG, ADDRESS, LONG, LONG, LONG, LONG, LONG, LONG]


def turned(a: Tensor) -> Tensor:
    """a^T as `product` takes it for w: a [columns, inner] by vectors of its rows, [panels, inner, width], a copy; where
    there is no kernel a view."""
    (columns, inner), on = a.shape, _kernels_for(a)
    if on is None:
        return a.t()
    w = a.new_empty(-(-columns // on.width), inner, on.width)
    lay_out(on, "turned", a[:, None], w.data_ptr(), NUMBER * inner * on.width)
    return w


def product(x: Tensor, w: Tensor, out: Tensor, times: float = 1.0, *, adds: bool = False) -> Tensor:
    """out = times * x w, or that added to it. x [rows, inner], w [inner, columns] or what `turned` gave, out [rows,
    columns]; x may have any strides, of the others rows are contiguous."""
    (rows, inner), columns = x.shape, out.shape[1]
    on, laid_out = _kernels_for(out), w.ndim == 3
    assert w.shape[-2] == inner
    assert laid_out or w.shape[1] == columns
    assert out.shape[0] == rows
    if on is None:
        return torch.addmm(out, x, w, beta=int(adds), alpha=times, out=out)
    assert x.dtype == w.dtype == torch.float32
    assert 1 in (columns, out.stride(1))
    assert 1 in (columns, w.stride(-1))
    steps = [NUMBER * step for step in (*x.stride(), w.stride(-2), w.stride(0) if laid_out else on.width)]
    _compiled(on)(
        threads_for(rows * inner * columns),
        x.data_ptr(),
        *steps[:2],
        w.data_ptr(),
        *steps[2:],
        out.data_ptr(),
        NUMBER * out.stride(0),
        rows,
        inner,
        columns,
        bits_of(times),
        int(adds),
    )
    return out


def _kernels_for(x: Tensor) -> Processor | None:
    on = processor() if x.dtype == torch.float32 and x.device.type == "cpu" else None
    return TILE if on is not None and on.width == TILE.width else None


class Writer:
    """Writes the kernel for one processor. Threads share the tiles."""

    def __init__(self, on: Processor) -> None:
        self.on, self.module = on, new_module()
        tiles = {rows: self._tile(rows) for rows in range(1, self.on.rows + 1)}
        f = Function(self.module, "share", [LONG, LONG, *KINDS])
        b, (thread, threads, x, x_row, x_along, w, w_step, panel, y, y_step, rows, inner, columns, times, adds) = (
            f.builder,
            f.arguments,
        )
        tall, wide = tiles_of(b, self.on, rows, x_row), parts_of(b, columns, self.on.width)
        first, last = share_of(b, b.mul(tall, wide), thread, threads)
        with f.loop(first, last) as (unit, _, _):
            row, end = share_of(b, rows, b.srem(unit, tall), tall)
            vector = b.sdiv(unit, tall)
            column = b.mul(vector, long(self.on.width))
            byte = b.mul(column, long(NUMBER))
            arguments = [at(b, x, b.mul(row, x_row)), x_row, x_along, at(b, w, b.mul(vector, panel)), w_step, inner]
            arguments += [at(b, y, b.add(b.mul(row, y_step), byte)), y_step, b.sub(columns, column), times, adds]
            call_for(f, tiles, b.sub(end, row), arguments)
        in_threads(self.module, "product", f.end())

    def _tile(self, rows: int) -> ir.Function:
        """x, its steps, w and its step, `inner`, y and its step, how many columns are left, `times`, `adds`."""
        kinds = [ADDRESS, LONG, LONG, ADDRESS, LONG, LONG, ADDRESS, LONG, LONG, LONG, LONG]
        f = Function(self.module, f"tile of {rows}", kinds)
        f.itself.attributes.add("noinline")
        b, v, (x, x_row, x_along, w, w_step, inner, y, y_step, left, times, adds) = (
            f.builder,
            Lanes(f, self.on.width),
            f.arguments,
        )
        some, before = v.below(left), v.below(b.mul(left, adds))

        def weigh(v: Lanes, place: Any, _: Any) -> Any:
            return v.load_some(place, some)

        def ahead(k: Any) -> None:  # the next vector of a row, which is as far away as `inner` is long
            fetch(self.module, b, at(b, w, b.add(b.mul(k, w_step), long(self.on.width * NUMBER))))

        sums = [v.number(0.0)] * rows
        sums = walk(f, self.on, sums, (x, x_row, x_along), (w, w_step), inner, weigh=weigh, ahead=ahead)
        factor = v.everywhere(given_number(b, times))
        for row, total in enumerate(sums):
            place = at(b, y, b.mul(y_step, long(row)))
            v.store_some(v.multiply_add(total, factor, v.load_some(place, before)), place, some)
        return f.end()


@once
def _compiled(on: Processor) -> Callable[..., None]:
    return compiled(Writer(on).module, "product")
