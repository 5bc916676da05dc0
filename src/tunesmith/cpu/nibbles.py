"""Weights of four bits written out as float32, in the order of operations that defines their numbers, to the bit.

gguf   blocks of 32 numbers: a float16 scale, in Q4_1 a float16 offset, 16 bytes, low halves first
       (code - 8) scale, or code scale + offset
nf4    two numbers a byte, high half first, and a float32 scale for 64 of them: table[code] scale
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from tunesmith.cpu.lanes import Lanes
from tunesmith.cpu.writing import (
    ADDRESS,
    BYTE,
    FLOAT,
    INT,
    LONG,
    NUMBER,
    SHORT,
    Function,
    Processor,
    at,
    compiled,
    declare,
    in_threads,
    long,
    new_module,
    number_at,
    once,
    processor,
    share_of,
    threads_for,
)

BYTES = 16  # taken at a time
NF4_BLOCK = 64


def kernels_for(*tensors: Tensor) -> Processor | None:
    """Where there are kernels, for contiguous memory of the CPU; else None."""
    plain = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    return processor() if plain else None


def nf4_kernels_for(*tensors: Tensor) -> Processor | None:
    """The same, where vectors are looked up in a table by one or two instructions."""
    on = kernels_for(*tensors)
    return on if on is not None and platform.machine() == "x86_64" else None


def write_gguf(on: Processor, blocks: Tensor, out: Tensor, *, offset: bool) -> None:
    """blocks [n, 18] of Q4_0, or [n, 20] of Q4_1 where they have an `offset`, uint8 -> out [n, 32] float32."""
    assert blocks.shape[1] == 18 + 2 * offset
    assert out.numel() == 2 * BYTES * len(blocks)
    _gguf(on, offset)(threads_for(out.numel()), blocks.data_ptr(), out.data_ptr(), len(blocks))


def write_nf4(on: Processor, codes: Tensor, scales: Tensor, table: Tensor, out: Tensor) -> None:
    """codes [n, 32] uint8, scales [n] and table [16] float32 -> out [n, 64] float32."""
    count = len(scales)
    assert codes.numel() * 2 == out.numel() == count * NF4_BLOCK
    assert table.shape == (16,)
    assert scales.dtype == table.dtype == out.dtype == torch.float32
    addresses = (codes.data_ptr(), scales.data_ptr(), table.data_ptr(), out.data_ptr())
    _nf4(on)(threads_for(out.numel()), *addresses, count)


@once
def _gguf(on: Processor, offset: bool) -> Callable[..., None]:
    """Threads share the blocks."""
    f = Function(new_module(), "share", [LONG, LONG, ADDRESS, ADDRESS, LONG])
    b, v = f.builder, Lanes(f, BYTES)
    thread, threads, blocks, out, count = f.arguments
    header = 4 if offset else 2
    first, last = share_of(b, count, thread, threads)
    with f.loop(first, last) as (block, _, _):
        here = at(b, blocks, b.mul(block, long(header + BYTES)))
        into = at(b, out, b.mul(block, long(2 * BYTES * NUMBER)))
        scale, more = (v.everywhere(_half(b, at(b, here, long(place)))) for place in (0, header - 2))
        for part, codes in enumerate(_halves(b, at(b, here, long(header)))):
            code = b.uitofp(codes, v.kind)
            number = b.fadd(b.fmul(code, scale), more) if offset else b.fmul(b.fsub(code, v.number(8.0)), scale)
            v.store(number, into, long(part * BYTES))
    in_threads(f.itself.module, "write", f.end())
    return compiled(f.itself.module, "write")


@once
def _nf4(on: Processor) -> Callable[..., None]:
    """Threads share the blocks."""
    f = Function(new_module(), "share", [LONG, LONG, *[ADDRESS] * 4, LONG])
    b, v = f.builder, Lanes(f, on.width)
    thread, threads, codes, scales, table, out, count = f.arguments
    parts = [v.load(table, long(first)) for first in range(0, 16, on.width)]
    first, last = share_of(b, count, thread, threads)
    with f.loop(first, last) as (block, _, _):
        scale = v.everywhere(number_at(b, scales, block))
        into = at(b, out, b.mul(block, long(NF4_BLOCK * NUMBER)))
        for half in range(NF4_BLOCK // 2 // BYTES):
            here = at(b, codes, b.add(b.mul(block, long(NF4_BLOCK // 2)), long(half * BYTES)))
            low, high = _halves(b, here)
            for start in range(0, 2 * BYTES, on.width):
                order = [i // 2 if i % 2 == 0 else BYTES + i // 2 for i in range(start, start + on.width)]
                own = b.shuffle_vector(high, low, ir.Constant(ir.VectorType(INT, on.width), order))
                found = _looked_up(f, v, parts, b.zext(own, v.whole))
                v.store(b.fmul(found, scale), into, long(half * 2 * BYTES + start))
    in_threads(f.itself.module, "write", f.end())
    return compiled(f.itself.module, "write")


def _halves(b: ir.IRBuilder, address: Any) -> tuple[Any, Any]:
    """The low and the high halves of 16 bytes."""
    kind = ir.VectorType(BYTE, BYTES)
    loaded = b.load(address, typ=kind, align=1)
    return b.and_(loaded, ir.Constant(kind, [15] * BYTES)), b.lshr(loaded, ir.Constant(kind, [4] * BYTES))


def _half(b: ir.IRBuilder, address: Any) -> Any:
    """A float16, as a float32."""
    return b.fpext(b.bitcast(b.load(address, typ=SHORT, align=1), ir.HalfType()), FLOAT)


def _looked_up(f: Function, v: Lanes, parts: list[Any], codes: Any) -> Any:
    """table[codes], by the instructions that permute a vector; with vectors of 8 the table has two parts."""
    name = {8: "llvm.x86.avx2.permps", 16: "llvm.x86.avx512.permvar.sf.512"}[v.count]
    permute = declare(f.itself.module, name, [v.kind, v.whole], v.kind)
    found = [f.builder.call(permute, [part, codes]) for part in parts]
    if len(found) == 1:
        return found[0]
    upper = f.builder.icmp_unsigned(">=", codes, ir.Constant(v.whole, [v.count] * v.count))
    return f.builder.select(upper, found[1], found[0])
