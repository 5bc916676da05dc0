"""Vectors of numbers in a kernel, and walking along a row with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir

from tunesmith.cpu.writing import ADDRESS, FLOAT, INT, LONG, NUMBER, Function, Processor, at, declare, long

# exp(r) for |r| <= ln(2) / 2, and ln(2) in two parts, of which the first times n is exact (Cephes' expf, S. Moshier)
LN2 = (0.693359375, -2.12194440e-4)
POWERS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
SMALLEST, LARGEST = -87.3, 88.3  # where float32 ends
ROUNDS = 1.5 * 2**23  # added to a number leaves it rounded, as an integer in the lowest bits


class Lanes:
    """Vectors of `count` numbers in a function being written."""

    def __init__(self, f: Function, count: int) -> None:
        self.module, self.b, self.count = f.itself.module, f.builder, count
        self.kind, self.whole = ir.VectorType(FLOAT, count), ir.VectorType(INT, count)

    def load(self, address: Any, i: Any) -> Any:
        return self.b.load(at(self.b, address, self.b.mul(i, long(NUMBER))), typ=self.kind, align=NUMBER)

    def store(self, value: Any, address: Any, i: Any) -> None:
        self.b.store(value, at(self.b, address, self.b.mul(i, long(NUMBER))), align=NUMBER)

    def below(self, end: Any) -> Any:
        """Which of a vector's places come before `end`, for `load_some` and `store_some`."""
        kind = ir.VectorType(LONG, self.count)
        return self.b.icmp_signed("<", ir.Constant(kind, list(range(self.count))), self.everywhere(end))

    def load_some(self, address: Any, some: Any) -> Any:
        """The numbers in some places, which alone are read, and zeros in the others."""
        kinds = [ADDRESS, INT, some.type, self.kind]
        function = declare(self.module, f"llvm.masked.load.v{self.count}f32.p0", kinds, self.kind)
        return self.b.call(function, [address, ir.Constant(INT, NUMBER), some, self.number(0.0)])

    def store_some(self, value: Any, address: Any, some: Any) -> None:
        kinds = [self.kind, ADDRESS, INT, some.type]
        function = declare(self.module, f"llvm.masked.store.v{self.count}f32.p0", kinds)
        self.b.call(function, [value, address, ir.Constant(INT, NUMBER), some])

    def number(self, value: float) -> Any:
        return ir.Constant(self.kind, [value] * self.count)

    def everywhere(self, value: Any) -> Any:
        nothing = ir.Constant(ir.VectorType(value.type, self.count), ir.Undefined)
        first = self.b.insert_element(nothing, value, ir.Constant(INT, 0))
        return self.b.shuffle_vector(first, nothing, ir.Constant(self.whole, [0] * self.count))

    def call(self, name: str, *values: Any) -> Any:
        """One of LLVM's functions of vectors."""
        function = declare(self.module, f"llvm.{name}.v{self.count}f32", [self.kind] * len(values), self.kind)
        return self.b.call(function, values)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        return self.call("fma", x, y, z)

    def total(self, x: Any) -> Any:
        """The sum of a vector's numbers."""
        return self._by_halves(x, self.b.fadd)

    def largest(self, x: Any) -> Any:
        """The largest of a vector's numbers; NaN where one is."""
        return self._by_halves(x, lambda one, other: larger(self.module, self.b, one, other))

    def _by_halves(self, x: Any, join: Callable[[Any, Any], Any]) -> Any:
        while (half := x.type.count // 2) > 0:
            low, high = (ir.Constant(ir.VectorType(INT, half), list(range(n, n + half))) for n in (0, half))
            nothing = ir.Constant(x.type, ir.Undefined)
            x = join(self.b.shuffle_vector(x, nothing, low), self.b.shuffle_vector(x, nothing, high))
        return self.b.extract_element(x, ir.Constant(INT, 0))

    def exp(self, x: Any) -> Any:
        """2^n e^r, with x = n ln(2) + r."""
        x = self.call("minnum", self.call("maxnum", x, self.number(SMALLEST)), self.number(LARGEST))
        rounded = self.multiply_add(x, self.number(1.4426950408889634), self.number(ROUNDS))
        n = self.b.fsub(rounded, self.number(ROUNDS))
        r = self.multiply_add(n, self.number(-LN2[1]), self.multiply_add(n, self.number(-LN2[0]), x))
        power = self.number(POWERS[0])
        for factor in POWERS[1:]:
            power = self.multiply_add(power, r, self.number(factor))
        power = self.multiply_add(power, self.b.fmul(r, r), self.b.fadd(r, self.number(1.0)))
        exponent = self.b.shl(self.b.bitcast(rounded, self.whole), ir.Constant(self.whole, [23] * self.count))
        return self.b.bitcast(self.b.add(self.b.bitcast(power, self.whole), exponent), self.kind)

    def sigmoid(self, x: Any) -> Any:
        one = self.number(1.0)
        return self.b.fdiv(one, self.b.fadd(one, self.exp(self.b.fneg(x))))


def larger(module: ir.Module, builder: ir.IRBuilder, one: Any, other: Any) -> Any:
    """Of two numbers, or of two vectors' numbers; NaN where one is."""
    kind = one.type
    name = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    return builder.call(declare(module, f"llvm.maximum.{name}", [kind, kind], kind), [one, other])


def exp(f: Function, x: Any) -> Any:
    """Of one number."""
    one = Lanes(f, 1)
    return f.builder.extract_element(one.exp(one.everywhere(x)), ir.Constant(INT, 0))


def along(f: Function, on: Processor, start: Any, stop: Any, emit: Callable[[Lanes, Any], None]) -> None:
    """emit(lanes, i) for all numbers from start to stop, in vectors, and the rest one by one."""
    whole = f.builder.add(start, f.builder.and_(f.builder.sub(stop, start), long(-on.width)))
    for count, first, last in ((on.width, start, whole), (1, whole, stop)):
        with f.loop(first, last, count) as (i, _, _):
            emit(Lanes(f, count), i)


def sum_along(f: Function, on: Processor, width: Any, emit: Callable[[Lanes, Any, Any], Any], ways: int = 1) -> Any:
    """The sum of what emit(lanes, i, so far) adds up for all numbers; `ways` sums at a time, for want of waiting."""
    return _gather_along(f, on, width, emit, ways, (0.0, Lanes.total, f.builder.fadd))


def largest_along(f: Function, on: Processor, width: Any, emit: Callable[[Lanes, Any], Any], ways: int = 1) -> Any:
    """The largest of what emit(lanes, i) gives for all numbers; NaN where one is."""
    module, b = f.itself.module, f.builder

    def keep(lanes: Lanes, i: Any, so_far: Any) -> Any:
        return larger(module, b, so_far, emit(lanes, i))

    return _gather_along(f, on, width, keep, ways, (-math.inf, Lanes.largest, partial(larger, module, b)))


def _gather_along(
    f: Function,
    on: Processor,
    width: Any,
    emit: Callable[[Lanes, Any, Any], Any],
    ways: int,
    how: tuple[float, Callable[[Lanes, Any], Any], Callable[[Any, Any], Any]],
) -> Any:
    """`how`: what one begins with, how a vector's numbers are joined, and how two numbers are."""
    (start, within, join), rest, whole = how, long(0), None
    for count, most in ((on.width, ways), (on.width, 1), (1, 1)):
        lanes, step = Lanes(f, count), count * most
        end = f.builder.add(rest, f.builder.and_(f.builder.sub(width, rest), long(-step)))
        with f.loop(rest, end, step, [lanes.number(start)] * most) as (i, so_far, following):
            for way in range(most):
                following[way] = emit(lanes, f.builder.add(i, long(way * count)), so_far[way])
        for each in so_far:
            found = within(lanes, each)
            whole = found if whole is None else join(whole, found)
        rest = end
    return whole
