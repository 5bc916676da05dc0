"""Writing a kernel in LLVM's language, and compiling it for this processor.

A kernel is a function of addresses and sizes, called through ctypes (which lets go of the interpreter's lock). It may
run in several threads: those of the OpenMP library that PyTorch itself uses, so that there is one pool of threads.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

import torch
from llvmlite import binding, ir

Given = TypeVarTuple("Given")
T = TypeVar("T")
BYTE, SHORT, INT, LONG, FLOAT = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
ADDRESS, NOTHING = ir.PointerType(), ir.VoidType()
LINE = 64  # bytes that memory gives at a time
NUMBER = 4  # bytes of a float32
FEW = 1 << 15  # what one thread does while a second is woken
THREADS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


class Processor(NamedTuple):
    """What a kernel is written for: vectors of `width` float32, and the tile of results it holds in registers."""

    width: int
    rows: int
    vectors: int  # of a tile's row

    @property
    def columns(self) -> int:
        """Of a tile."""
        return self.width * self.vectors


@cache
def processor() -> Processor | None:
    """This machine's, or None where no kernel is written for it: tiles are as large as its registers hold."""
    if sys.platform != "linux" or _openmp() is None:
        return None
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return Processor(16, 12, 2)  # 32 registers
    if features.get("avx2") and features.get("fma"):
        return Processor(8, 6, 2)  # 16
    if platform.machine() == "aarch64":
        return Processor(4, 6, 4)  # 32
    return None


def long(number: int) -> ir.Constant:
    return ir.Constant(LONG, number)


def at(builder: ir.IRBuilder, address: Any, offset: Any) -> Any:
    """address + offset bytes."""
    return builder.gep(address, [offset], source_etype=BYTE)


def integer_at(builder: ir.IRBuilder, numbers: Any, i: Any) -> Any:
    """numbers[i], int64."""
    return builder.load(at(builder, numbers, builder.mul(i, long(8))), typ=LONG, align=8)


def number_at(builder: ir.IRBuilder, numbers: Any, i: Any) -> Any:
    """numbers[i], float32."""
    return builder.load(at(builder, numbers, builder.mul(i, long(NUMBER))), typ=FLOAT, align=NUMBER)


def smaller(builder: ir.IRBuilder, one: Any, other: Any) -> Any:
    """Of two integers."""
    return builder.select(builder.icmp_signed("<", one, other), one, other)


def greater(builder: ir.IRBuilder, one: Any, other: Any) -> Any:
    """Of two integers."""
    return builder.select(builder.icmp_signed(">", one, other), one, other)


def parts_of(builder: ir.IRBuilder, count: Any, size: int) -> Any:
    """Into how many parts of at most `size` so many fall."""
    return builder.sdiv(builder.add(count, long(size - 1)), long(size))


def share_of(builder: ir.IRBuilder, count: Any, thread: Any, threads: Any) -> tuple[Any, Any]:
    """A thread's share of [0, count): its first, and one past its last."""
    first, last = (builder.sdiv(builder.mul(count, n), threads) for n in (thread, builder.add(thread, long(1))))
    return first, last


def threads_for(work: int) -> int:
    """How many threads are worth waking for so many numbers or multiplications."""
    return torch.get_num_threads() if work >= FEW else 1


@cache
def bits_of(number: float) -> int:
    """A float32 as the integer that a kernel is given."""
    return int.from_bytes(struct.pack("<f", number), "little")


def given_number(builder: ir.IRBuilder, bits: Any) -> Any:
    """The float32 of which a kernel was given `bits_of`."""
    return builder.bitcast(builder.trunc(bits, INT), FLOAT)


def is_there(builder: ir.IRBuilder, address: Any) -> Any:
    """Whether an address is one, and not 0."""
    return builder.icmp_unsigned("!=", builder.ptrtoint(address, LONG), long(0))


def fetch(module: ir.Module, builder: ir.IRBuilder, line: Any) -> None:
    """Ask for a line of memory, which may be anywhere: a hint."""
    hint = declare(module, "llvm.prefetch.p0", [ADDRESS, INT, INT, INT])
    builder.call(hint, [line, *(ir.Constant(INT, number) for number in (0, 2, 1))])  # to read, to keep, data


def scratch(builder: ir.IRBuilder, size: int) -> Any:
    """Memory of `size` bytes while the function runs."""
    return builder.inttoptr(builder.ptrtoint(builder.alloca(BYTE, size=size), LONG), ADDRESS)


class Function:
    """A function being written: `builder` stands at its end, `arguments` are its own."""

    def __init__(self, module: ir.Module, name: str, kinds: Sequence[ir.Type], *, inside: bool = True) -> None:
        """`inside`: only called by other functions of the module."""
        self.itself = ir.Function(module, ir.FunctionType(NOTHING, kinds), name)
        if inside:
            self.itself.linkage = "internal"
        self.arguments = self.itself.args
        self.builder = ir.IRBuilder(self.itself.append_basic_block())

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1, carried: Sequence[Any] = ()) -> Iterator[tuple[Any, Any, Any]]:
        """for i in range(start, stop, step). Yields i, the carried values of this turn, and the list of those of the
        next, to be filled in. After the loop the former are the last turn's results."""
        builder, before = self.builder, self.builder.block
        head, body, end = (self.itself.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        i, *values = (builder.phi(v.type) for v in (start, *carried))
        for phi, value in zip((i, *values), (start, *carried), strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", i, stop), body, end)
        builder.position_at_end(body)
        following = list(values)
        yield i, values, following
        for phi, value in zip((i, *values), (builder.add(i, long(step)), *following), strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(end)

    def either(self, one: tuple[Any, Any], other: tuple[Any, Any]) -> Any:
        """The value of the block that was left last; each is (value, block)."""
        phi = self.builder.phi(one[0].type)
        for value, block in (one, other):
            phi.add_incoming(value, block)
        return phi

    def end(self) -> ir.Function:
        self.builder.ret_void()
        return self.itself


def new_module() -> ir.Module:
    module = ir.Module()
    module.triple = binding.get_default_triple()
    return module


def declare(module: ir.Module, name: str, kinds: Sequence[ir.Type], result: ir.Type = NOTHING) -> ir.Function:
    """A function from elsewhere: one of LLVM's own, or of THREADS."""
    found = module.globals.get(name)
    return found or ir.Function(module, ir.FunctionType(result, kinds), name)


def in_threads(module: ir.Module, name: str, share: ir.Function) -> None:
    """Write the function that is called from outside: `share` in every thread.

    `share` takes a thread's number and how many there are, then what it needs; the outer one takes how many there are
    to be, then the same.
    """
    kinds = [argument.type for argument in share.args[2:]]
    work = Function(module, f"{name} in a thread", [ADDRESS])
    thread, threads = (work.builder.call(declare(module, each, [], INT), []) for each in THREADS[1:])
    own = [
        work.builder.load(at(work.builder, work.arguments[0], long(8 * i)), typ=kind, align=8)
        for i, kind in enumerate(kinds)
    ]
    work.builder.call(share, [*(work.builder.sext(number, LONG) for number in (thread, threads)), *own])
    work.end()

    outer = Function(module, name, [LONG, *kinds], inside=False)
    builder, (count, *given) = outer.builder, outer.arguments
    with builder.if_else(builder.icmp_signed("==", count, long(1))) as (one, several):
        with one:
            builder.call(share, [long(0), long(1), *given])
        with several:
            room = scratch(builder, 8 * len(given))
            for i, value in enumerate(given):
                builder.store(value, at(builder, room, long(8 * i)), align=8)
            start = declare(module, THREADS[0], [ADDRESS, ADDRESS, INT, INT])
            builder.call(start, [work.itself, room, builder.trunc(count, INT), ir.Constant(INT, 0)])
    outer.end()


def once(make: Callable[[*Given], T]) -> Callable[[*Given], T]:
    """functools.cache for what several threads may ask for at a time: it is made once, and the others wait."""
    known, making = dict[Any, T](), threading.Lock()

    def ask(*arguments: *Given) -> T:
        if arguments not in known:
            with making:
                if arguments not in known:
                    known[arguments] = make(*arguments)
        return known[arguments]

    return ask


class Watched(threading.local):
    """What notes the kernels that this thread calls: a cpu.tape.Tape."""

    tape: Any = None

    def keep(self, *objects: object) -> None:
        """Let what kernels are given the address of, other than tensors, live as long as the tape."""
        if self.tape is not None:
            self.tape.kept.extend(objects)

    def keep_addresses(self, *tables: array[int]) -> None:
        """The same of what consists of addresses itself."""
        if self.tape is not None:
            self.tape.tables.extend(tables)


WATCHED = Watched()


def optimised(module: ir.Module, cpu: str, features: str = "") -> tuple[binding.ModuleRef, binding.TargetMachine]:
    """A module as LLVM leaves it for a processor, and what makes machine code of it."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    machine = binding.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3)
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = False  # kernels are written as wide as the registers allow
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return parsed, machine


def compiled(module: ir.Module, name: str) -> Callable[..., None]:
    """The function of that name, taking addresses and sizes as integers, which are not checked."""
    for each in THREADS:
        address = ctypes.cast(getattr(_openmp(), each), ctypes.c_void_p).value
        assert address is not None
        binding.add_symbol(each, address)
    features = binding.get_host_cpu_features().flatten()
    parsed, machine = optimised(module, binding.get_host_cpu_name(), features)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    arguments = len(next(f for f in module.functions if f.name == name).args)
    address = engine.get_function_address(name)
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(address)

    def call(*arguments: int) -> None:
        if WATCHED.tape is not None:
            WATCHED.tape.note(address, arguments)
        kernel(*arguments)

    return call


_ENGINES: list[Any] = []  # what was compiled lives as long as the process


@cache
def _openmp() -> ctypes.CDLL | None:
    """PyTorch's library, through which the names of the OpenMP it was linked against are found."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library if all(hasattr(library, name) for name in THREADS) else None
    except OSError:
        return None
