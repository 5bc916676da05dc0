"""Products by kernels: those of plain mathematics, and a row's the same whatever is computed beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.cpu.products import Panels, back_product, product
from tunesmith.cpu.writing import Processor

SIZES = [
    (1, 3),
    (24, 16),
    (100, 7),
    (48, 1030),
    (1100, 33),
]  # out, in: panels cut off, a panel turned over in two parts


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("out", "inner"), SIZES)
@pytest.mark.parametrize("rows", [1, 2, 7, 13, 50])
def test_all_that_a_product_adds(on: Processor | None, threads: int, rows: int, out: int, inner: int) -> None:
    x, weight, bias = torch.randn(rows, inner + 2)[:, 1:-1], torch.randn(out, inner), torch.randn(out)
    added, h, u = torch.randn(rows, out + 3)[:, :out], torch.randn(rows, 9)[:, 2:7], torch.randn(out, 5)
    panels, more = Panels.of(weight), Panels.of(u)
    plain = x.double() @ weight.double().t()
    close(product(x, panels), plain)
    whole = plain + bias + added.double() + h.double() @ u.double().t()
    close(product(x, panels, bias=bias, added=added, thin=(h, more)), whole)
    beside = torch.full((rows, out + 5), 7.0)
    product(x, panels, bias=bias, added=added, thin=(h, more), out=beside[:, 2 : 2 + out])
    close(beside[:, 2 : 2 + out], whole)
    beside[:, 2 : 2 + out] = 7.0
    assert (beside == 7.0).all()  # nothing was written but the product
    product(x, panels, out=added, added=added, bias=bias, thin=(h, more))  # onto itself
    close(added, whole)


@pytest.mark.parametrize(("out", "inner"), SIZES)
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_the_way_back_from_the_same_panels(on: Processor | None, threads: int, rows: int, out: int, inner: int) -> None:
    dy, weight, added = torch.randn(rows, out), torch.randn(out, inner), torch.randn(rows, inner)
    h, u = torch.randn(rows, 5), torch.randn(inner, 5)
    panels, plain = Panels.of(weight), dy.double() @ weight.double()
    close(back_product(dy, panels), plain)
    given = added.clone()
    close(back_product(dy, panels, added=given, thin=(h, Panels.of(u))), plain + added + h.double() @ u.double().t())
    assert torch.equal(given, added)


@pytest.mark.parametrize(("out", "inner"), SIZES)
def test_integers_and_scales(on: Processor | None, out: int, inner: int) -> None:
    codes, scale, bias = torch.randint(-127, 128, (out, inner), dtype=torch.int8), torch.rand(out), torch.randn(out)
    x = torch.randn(7, inner)
    close(product(x, Panels.of(codes, scale), bias=bias), x.double() @ (codes * scale[:, None]).double().t() + bias)


def test_a_row_does_not_depend_on_what_is_beside_it_or_on_threads(on: Processor | None) -> None:
    if on is None:
        pytest.skip("PyTorch's own products do")
    panels, back = Panels.of(torch.randn(200, 70)), Panels.of(torch.randn(70, 200))
    x, before = torch.randn(60, 70), torch.get_num_threads()
    whole = [product(x, panels), back_product(x, back)]
    for count in (1, 3):
        torch.set_num_threads(count)
        for first, last in ((0, 60), (0, 1), (5, 11), (59, 60)):
            part = x[first:last]
            for found, expected in zip((product(part, panels), back_product(part, back)), whole, strict=True):
                assert torch.equal(found, expected[first:last])
    torch.set_num_threads(before)


def test_blocks_are_written_where_they_belong(on: Processor | None) -> None:
    weight, panels, x = torch.zeros(96, 9), Panels.of(torch.zeros(96, 9)), torch.randn(4, 9)
    for rows, columns in ((slice(0, 64), slice(0, 4)), (slice(64, 96), slice(4, 6)), (slice(3, 50), slice(6, 9))):
        weight[rows, columns] = block = torch.randn(rows.stop - rows.start, columns.stop - columns.start)
        panels.write(rows, columns, block)
    close(product(x, panels), x.double() @ weight.double().t())


@pytest.mark.parametrize("rows", [slice(0, 100), slice(48, 100), slice(0, 50), slice(37, 61), slice(99, 100)])
def test_some_rows_of_panels(on: Processor | None, rows: slice) -> None:
    weight, x = torch.randn(100, 21), torch.randn(5, 21)
    part, before = Panels.of(weight).part(rows)
    found = product(x, part)
    assert before < 48
    assert found.shape == (5, before + rows.stop - rows.start)
    close(found[:, before:], (x.double() @ weight.double().t())[:, rows])


@pytest.mark.parametrize("columns", [slice(0, 21), slice(2, 7), slice(4, 20)])
@pytest.mark.parametrize("rows", [slice(0, 100), slice(48, 100), slice(0, 48), slice(96, 100)])
@pytest.mark.parametrize("lies", ["by rows", "by columns", "apart"])
def test_blocks_by_rows_and_by_columns(
    on: Processor | None, threads: int, rows: slice, columns: slice, lies: str
) -> None:
    """A matrix whose last panel is cut off, blocks of it scaled on their way; beside them nothing is written."""
    weight = torch.randn(100, 21)
    panels, height, width = Panels.of(weight.clone()), rows.stop - rows.start, columns.stop - columns.start
    block = torch.randn(width, height).t() if lies == "by columns" else torch.randn(height, 2 * width)[:, :width]
    if lies == "apart":
        block = torch.randn(height, 2 * width)[:, ::2]
    panels.write(rows, columns, block, 0.5)
    weight[rows, columns] = block * 0.5
    assert torch.equal(product(torch.eye(21), panels), weight.t())


def test_products_keep_to_the_bands_of_what_stands_beside(on: Processor | None, threads: int) -> None:
    """Blocks that end within a panel, one without columns, rows that belong to none; elsewhere is not even looked."""
    blocks = [(slice(0, 64), slice(0, 4)), (slice(64, 75), slice(4, 4)), (slice(75, 130), slice(4, 9))]
    u, h, x = torch.zeros(200, 9), torch.randn(50, 9), torch.randn(50, 30)
    for rows, columns in blocks:
        u[rows, columns] = torch.randn(rows.stop - rows.start, columns.stop - columns.start)
    panels, beside = Panels.of(torch.randn(200, 30)), Panels.of(u)
    beside.keep_to_bands(blocks)
    plain = product(x, panels).double()
    close(product(x, panels, thin=(h, beside)), plain + h.double() @ u.double().t())
    if on is not None:
        h[:, 4:] = torch.nan
        assert not product(x, panels, thin=(h, beside))[:, : 64 // on.columns * on.columns].isnan().any()


@pytest.mark.parametrize("step", [512, 1024])
def test_rows_that_share_lines_of_the_cache(on: Processor | None, step: int) -> None:
    weight, x = torch.randn(70, 40), torch.randn(50, step)
    panels = Panels.of(weight)
    close(product(x[:, :40], panels), x[:, :40].double() @ weight.double().t())
    close(back_product(x[:, :70], panels), x[:, :70].double() @ weight.double())


def test_no_rows_and_shapes_that_do_not_fit(on: Processor | None) -> None:
    panels = Panels.of(torch.randn(20, 10))
    assert product(torch.empty(0, 10), panels).shape == (0, 20)
    with pytest.raises(AssertionError):
        product(torch.randn(3, 9), panels)
    with pytest.raises(AssertionError):
        back_product(torch.randn(3, 10), panels)
    if on is not None:  # a kernel checks no address
        with pytest.raises(AssertionError):
            product(torch.randn(3, 10), panels, out=torch.empty(2, 20))
        with pytest.raises(AssertionError):
            product(torch.randn(10, 3).t(), panels)
