"""What LLVM makes of the kernels: sums of a tile that don't stay in registers cost half of a product's speed."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable

import pytest
from llvmlite import ir

from tunesmith.cpu import blocks, narrow
from tunesmith.cpu.flash_kernels import Backward, Forward
from tunesmith.cpu.tiles import Kind, Tiles
from tunesmith.cpu.writing import Processor, optimised

STORED = re.compile(r"[yz]mm\d+, \S*\(%rsp\)")  # on the stack, at a place known beforehand
WIDE, NARROW = Processor(16, 12, 2), Processor(8, 6, 2)
WRITERS: dict[str, Callable[[Processor], ir.Module]] = {
    **{f"product {kind.name}": lambda on, kind=kind: Tiles(on, kind).module for kind in Kind},
    "attention forward": lambda on: Forward(on, 64).module,
    "blocks": lambda on: blocks.Writer(on).module,
    "attention backward": lambda on: Backward(on, 64).module,
}


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64's assembly")


def check(module: ir.Module, cpu: str, on: Processor) -> None:
    parsed, machine = optimised(module, cpu)
    pieces = re.split(r"\n(?=\.L\w+:)", machine.emit_assembly(parsed))
    ends = [(block, re.search(rf"\tj\w+\t{re.escape(block.split(':')[0])}$", block, re.M)) for block in pieces]
    loops = [block[: end.end()] for block, end in ends if end]
    assert sum(block.count("vfmadd") >= on.rows * on.vectors for block in loops)  # the whole tiles are among them
    assert [block for block in loops if STORED.search(block)] == []


@needs_x86
@pytest.mark.parametrize(
    ("cpu", "on"), [("znver4", WIDE), ("skylake-avx512", WIDE), ("znver3", NARROW), ("haswell", NARROW)]
)
@pytest.mark.parametrize("kernel", WRITERS)
def test_no_loop_stores_vectors_on_the_stack(kernel: str, cpu: str, on: Processor) -> None:
    check(WRITERS[kernel](on), cpu, on)


@needs_x86
@pytest.mark.parametrize("cpu", ["znver4", "skylake-avx512"])
def test_narrow_products_neither(cpu: str) -> None:
    check(narrow.Writer(narrow.TILE).module, cpu, narrow.TILE)
