"""Products with a narrow side, of matrices as they lie, against plain mathematics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.cpu import narrow
from tunesmith.cpu.writing import Processor

SIZES = [(1, 1, 1), (50, 3, 16), (24, 70, 8), (16, 50, 100), (48, 33, 37), (3, 0, 20)]  # rows, inner, columns


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
@pytest.mark.parametrize("turned", [False, True])
def test_it_is_the_product_and_touches_nothing_else(
    on: Processor | None, threads: int, rows: int, inner: int, columns: int, turned: bool
) -> None:
    x = torch.randn(inner, rows + 3)[:, 1:-2].t() if turned else torch.randn(rows, inner + 2)[:, 1:-1]
    w, whole = torch.randn(inner, columns + 4)[:, 2:-2], torch.full((rows, columns + 5), 7.0)
    out = whole[:, 2:-3]
    expected = 0.5 * (x.double() @ w.double())
    assert narrow.product(x, w, out, 0.5) is out
    close(out, expected)
    narrow.product(x, w, out, 2.0, adds=True)
    close(out, 5 * expected)
    out[:] = 7.0
    assert (whole == 7.0).all()


@pytest.mark.parametrize(("columns", "inner"), [(1, 5), (16, 20), (25, 70), (48, 576)])
def test_a_matrix_turned_over(on: Processor | None, threads: int, columns: int, inner: int) -> None:
    x, a, out = torch.randn(30, inner), torch.randn(columns, inner), torch.empty(30, columns)
    close(narrow.product(x, narrow.turned(a), out), x.double() @ a.double().t())


def test_what_was_there_before_does_not_matter_unless_it_is_added_to(on: Processor | None) -> None:
    x, w, out = torch.randn(5, 6), torch.randn(6, 7), torch.full((5, 7), torch.nan)
    close(narrow.product(x, w, out), x.double() @ w.double())


@pytest.mark.parametrize("step", [512, 1024])
def test_rows_that_share_lines_of_the_cache(on: Processor | None, step: int) -> None:
    x, w = torch.randn(70, step)[:, :40], torch.randn(40, 16)
    close(narrow.product(x, w, torch.empty(70, 16)), x.double() @ w.double())


def test_numbers_of_another_type_are_left_to_pytorch(on: Processor | None) -> None:
    x, w = torch.randn(5, 6).double(), torch.randn(7, 6).double()
    torch.testing.assert_close(narrow.product(x, narrow.turned(w), torch.empty(5, 7).double()), x @ w.t())


def test_shapes_that_do_not_fit(on: Processor | None) -> None:
    for w, out in ((torch.randn(5, 7), torch.empty(4, 7)), (torch.randn(6, 7), torch.empty(4, 8))):
        with pytest.raises(AssertionError):
            narrow.product(torch.randn(4, 6), w, out)
