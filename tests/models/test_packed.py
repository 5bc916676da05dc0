"""Packed weights: the same products, and originals that cost no memory meanwhile."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tunesmith.models.packed import PackedLinear, page_out


@pytest.mark.parametrize("rows", [1, 5, 300])
def test_packed_products_are_the_plain_ones(rows: int) -> None:
    torch.manual_seed(0)
    weights, biases = [torch.randn(24, 16), torch.randn(8, 16)], [torch.randn(24), None]
    x = torch.randn(rows, 16)
    expected = torch.cat([x @ weights[0].t() + biases[0], x @ weights[1].t()], dim=1)
    torch.testing.assert_close(PackedLinear.of(weights, biases)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="a hint that only Linux takes")
def test_a_mapped_weight_that_is_paged_out_costs_nothing_and_keeps_its_values(tmp_path: Path) -> None:
    numbers = np.arange(4_000_000, dtype=np.float32)
    numbers.tofile(tmp_path / "weight")
    weight = torch.from_file(str(tmp_path / "weight"), size=len(numbers), dtype=torch.float32)
    before = weight.double().sum()  # reads every page
    held = file_pages()
    page_out(weight)
    assert file_pages() < held - 10_000_000
    assert weight.double().sum() == before


def test_a_weight_of_a_few_numbers_has_no_page_of_its_own_to_give() -> None:
    page_out(weight := torch.ones(3))
    assert weight.sum() == 3


def file_pages() -> int:
    """Bytes of mapped files that this process holds in memory."""
    (kilobytes,) = re.findall(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1000 * int(kilobytes)
