"""Products with frozen float32 matrices on the CPU: kernels where there are some for the processor, else plain ones.

    product(x, W)       x W^T (+ h U^T) (+ bias) (+ what is added)      W laid out once: Panels
    back_product(dy, W) dy W (+ g A)                                    from the same panels

From 4 to 64 rows, where a decoder generates, the kernels are 1.4 to 2 times as fast as oneDNN's over its own packed
weights, at hundreds of rows and one thread each 1.3 times (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tunesmith.cpu.layouts import lay_out
from tunesmith.cpu.pages import LargePages
from tunesmith.cpu.tiles import Kind, Tiles
from tunesmith.cpu.writing import NUMBER, Processor, compiled, once, processor, threads_for

PAGES = LargePages()  # of the panels that are kept


class Panels:
    """A matrix W laid out for products with it: float32, or int8 with a scale for each row of W.

    A copy where there are kernels; elsewhere, and for other types, the matrix itself, which nobody may change
    meanwhile.
    """

    def __init__(self, out: int, inner: int, numbers: Tensor, on: Processor | None) -> None:
        """W is [out, inner]. `of` and `empty` are how one comes by panels."""
        self.out, self.inner, self.numbers, self.on = out, inner, numbers, on
        self.scale: Tensor | None = None
        self.bands: Tensor | None = None  # [panels, 2]: `keep_to_bands`
        self.panel_bytes = 0 if on is None else inner * on.columns * numbers.itemsize

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor | None = None) -> Panels:
        """weight [out, in], any strides; scale [out], only with int8."""
        assert (weight.dtype == torch.int8) is (scale is not None)
        (out, inner), on = weight.shape, _kernels_for(weight.dtype)
        if on is None:
            panels = cls(out, inner, weight, None)
            panels.scale = scale
            return panels
        panels = cls.empty(out, inner, partial(PAGES.zeros, dtype=weight.dtype))
        if scale is None:
            panels.write(slice(0, out), slice(0, inner), weight)
        else:
            panels.numbers.transpose(1, 2).copy_(_padded(weight, on.columns).unflatten(0, (-1, on.columns)))
            panels.scale = _padded(scale, on.columns)
        return panels

    @classmethod
    def empty(cls, out: int, inner: int, room: Callable[[int], Tensor]) -> Panels:
        """Of no numbers yet; `room(n)` gives memory for n of them, [n]."""
        on = _kernels_for(room(0).dtype)
        if on is None:
            return cls(out, inner, room(out * inner).view(out, inner), None)
        panels, columns = -(-out // on.columns), on.columns
        numbers, tail = panels * inner * columns, columns**2  # BACK reads a block beyond the end, in vain
        return cls(out, inner, room(numbers + tail)[:numbers].view(panels, inner, columns), on)

    def write(self, rows: slice, columns: slice, block: Tensor, times: float = 1.0) -> None:
        """W[rows, columns] = block * times, in float32. Rows that begin or end within a panel take longer."""
        if self.on is None:
            self.numbers[rows, columns] = block * times
            return
        wide = self.on.columns
        if rows.start % wide or (rows.stop % wide and rows.stop != self.out):
            row = torch.arange(rows.start, rows.stop)
            self.numbers[row // wide, columns, row % wide] = block * times
            return
        if 1 not in block.stride():
            block = block.contiguous()
        turned = block.stride(1) == 1
        x = (block if turned else block.t())[:, None]
        place = self.numbers.data_ptr() + rows.start // wide * self.panel_bytes + columns.start * wide * NUMBER
        lay_out(self.on, "turned" if turned else "split", x, place, self.panel_bytes, times)

    def keep_to_bands(self, blocks: Sequence[tuple[slice, slice]]) -> None:
        """Say that W consists of such blocks, rows and columns, one below the other, and zeros: no product is made with
        those of a panel that has nothing but them."""
        wide = 1 if self.on is None else self.on.columns
        bands = [[self.inner, 0] for _ in range(-(-self.out // wide))]
        for rows, columns in blocks:
            for band in bands[rows.start // wide : -(-rows.stop // wide)]:
                band[:] = min(band[0], columns.start), max(band[1], columns.stop)
        self.bands = torch.tensor([(min(band), band[1]) for band in bands])

    def part(self, rows: slice) -> tuple[Panels, int]:
        """Some of W's rows, without a copy, and how many of those before them come along: none where a panel begins."""
        assert self.scale is None
        wide = 1 if self.on is None else self.on.columns
        first, more = divmod(rows.start, wide)
        return Panels(rows.stop - first * wide, self.inner, self.numbers[first : -(-rows.stop // wide)], self.on), more

    def rows(self, ids: Tensor) -> Tensor:
        """W[ids], a copy: [..., in] for ids [...]."""
        assert self.scale is None
        if self.on is None:
            return self.numbers[ids]
        return self.numbers[ids // self.on.columns, :, ids % self.on.columns]

    @property
    def matrix(self) -> Tensor:
        """W [out, in], where there are no kernels."""
        return self.numbers if self.scale is None else self.numbers * self.scale[:, None]


def _kernels_for(dtype: torch.dtype) -> Processor | None:
    return processor() if dtype in (torch.float32, torch.int8) else None


Thin = tuple[Tensor, Panels]  # h [rows, rank] and U [out, rank]


def product(
    x: Tensor,
    w: Panels,
    *,
    out: Tensor | None = None,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    thin: Thin | None = None,
) -> Tensor:
    """x W^T + h U^T + bias + added, written to `out` [rows, out], which may be `added` itself, and returned.

    x [rows, in]; added [rows, out]; bias [out]. All float32, their rows contiguous.
    """
    assert x.shape[1] == w.inner
    assert bias is None or bias.shape == (w.out,)
    if w.on is None:
        return _plain(x @ w.matrix.t() if bias is None else torch.addmm(bias, x, w.matrix.t()), out, added, thin)
    kind = Kind.FORWARD if w.scale is None else Kind.INTEGERS
    y = x.new_empty(x.shape[0], w.out) if out is None else out
    whole_bias = None if bias is None else _padded(bias, w.on.columns)
    _run(w.on, kind, x, w, y, added=added, thin=thin, bias=whole_bias)
    return y


def back_product(
    dy: Tensor, w: Panels, *, out: Tensor | None = None, added: Tensor | None = None, thin: Thin | None = None
) -> Tensor:
    """dy W + h U^T + added [rows, in], written to `out` and returned. dy [rows, out], W in float32; U [in, rank]."""
    assert dy.shape[1] == w.out
    assert w.scale is None
    if w.on is None:
        return _plain(dy @ w.matrix, out, added, thin)
    y = dy.new_empty(dy.shape[0], w.inner) if out is None else out
    _run(w.on, Kind.BACK, dy, w, y, added=added, thin=thin)
    return y


def _run(
    on: Processor,
    kind: Kind,
    x: Tensor,
    w: Panels,
    y: Tensor,
    *,
    added: Tensor | None = None,
    thin: Thin | None = None,
    bias: Tensor | None = None,
) -> None:
    (rows, width), inner = y.shape, x.shape[1]
    assert x.shape[0] == rows
    assert x.dtype == y.dtype == torch.float32
    assert x.stride(1) == 1 or inner == 1
    assert y.stride(1) == 1 or width == 1
    h, u = (x, None) if thin is None else thin
    assert u is None or (u.out == width and h.shape == (rows, u.inner) and u.scale is None and h.dtype == x.dtype)
    assert u is None or h.stride(1) == 1 or u.inner == 1
    assert added is None or (added.shape == y.shape and added.stride(1) == 1 and added.dtype == y.dtype)
    if not rows or not width:
        return
    threads = threads_for(rows * inner * width)
    split_rows = width < 4 * threads * on.columns and rows >= threads * on.rows
    _compiled(on, kind)(
        threads,
        x.data_ptr(),
        NUMBER * x.stride(0),
        w.numbers.data_ptr(),
        w.panel_bytes,
        inner,
        h.data_ptr(),
        NUMBER * h.stride(0),
        0 if u is None else u.numbers.data_ptr(),
        0 if u is None else u.inner,
        0 if u is None or u.bands is None else u.bands.data_ptr(),
        y.data_ptr(),
        NUMBER * y.stride(0),
        0 if added is None else added.data_ptr(),
        0 if added is None else NUMBER * added.stride(0),
        0 if bias is None else bias.data_ptr(),
        0 if w.scale is None else w.scale.data_ptr(),
        rows,
        width,
        int(split_rows),
    )


def _plain(y: Tensor, out: Tensor | None, added: Tensor | None, thin: Thin | None) -> Tensor:
    if thin is not None:
        y = torch.addmm(y, thin[0], thin[1].matrix.t())
    y = y if added is None else y + added
    return y if out is None else out.copy_(y)


def _padded(numbers: Tensor, columns: int) -> Tensor:
    """Zeros behind, up to whole panels."""
    missing = -len(numbers) % columns
    return torch.cat((numbers, numbers.new_zeros(missing, *numbers.shape[1:]))) if missing else numbers


@once
def _compiled(on: Processor, kind: Kind) -> Callable[..., None]:
    return compiled(Tiles(on, kind).module, "product")
