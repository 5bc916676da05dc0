"""Products with frozen float32 matrices on the CPU: kernels where there are some for the processor, else plain ones.

    product(x, W)       x W^T (+ h U^T) (+ bias) (+ what is added)      W laid out once: Panels
    back_product(dy, W) dy W (+ g A)                                    from the same panels

From 4 to 64 rows, where a decoder generates, the kernels are 1.4 to 2 times as fast as oneDNN's over its own packed
weights, at hundreds of rows and one thread each 1.3 times (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.cpu.tiles import Kind, Tiles
from tunesmith.cpu.writing import NUMBER, Processor, compiled, once, processor, threads_for


class Panels:
    """A matrix W laid out for products with it: float32, or int8 with a scale for each row of W.

    A copy where there are kernels; elsewhere the matrix itself, which nobody may change meanwhile.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """weight [out, in], any strides; scale [out], only with int8."""
        assert (weight.dtype, scale is None) in ((torch.float32, True), (torch.int8, False))
        self.out, self.inner = weight.shape
        self.on = processor()
        self.panel_bytes = 0
        if self.on is None:
            self.numbers, self.scale = weight, scale
            return
        padded, columns = _padded(weight, self.on.columns), self.on.columns
        panels, tail = len(padded) // columns, columns**2  # BACK reads a block beyond the end, in vain
        room = weight.new_zeros(padded.numel() + tail)[: padded.numel()].view(panels, self.inner, columns)
        self.numbers = room.copy_(padded.unflatten(0, (panels, columns)).transpose(1, 2))
        self.panel_bytes = self.inner * columns * weight.itemsize
        self.scale = None if scale is None else _padded(scale, self.on.columns)

    def write(self, rows: slice, columns: slice, block: Tensor) -> None:
        """W[rows, columns] = block."""
        if self.on is None:
            self.numbers[rows, columns] = block
        elif rows.start % self.on.columns or len(block) % self.on.columns:
            row = torch.arange(rows.start, rows.stop)
            self.numbers[row // self.on.columns, columns, row % self.on.columns] = block
        else:
            panels = slice(rows.start // self.on.columns, rows.stop // self.on.columns)
            self.numbers[panels, columns].transpose(1, 2).copy_(block.unflatten(0, (-1, self.on.columns)))

    @property
    def matrix(self) -> Tensor:
        """W [out, in], where there are no kernels."""
        return self.numbers if self.scale is None else self.numbers * self.scale[:, None]


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
