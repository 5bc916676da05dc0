"""What a decoder does row by row between its products: RMSNorm, SwiGLU, rotary embedding, and the way back; softmax.

One or two passes over memory each, where PyTorch's operations make three to eight. What they compute is said by
tunesmith.models.fused_ops and tunesmith.tree.heads, which have the same in plain mathematics and for any type. Tensors
are float32 on the CPU, their last dimension contiguous; the caller has asked `usable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from tunesmith.cpu.lanes import Lanes, along, largest_along, sum_along
from tunesmith.cpu.writing import (
    ADDRESS,
    FLOAT,
    LONG,
    NUMBER,
    Function,
    Processor,
    at,
    bits_of,
    compiled,
    declare,
    given_number,
    in_threads,
    long,
    new_module,
    number_at,
    once,
    processor,
    share_of,
    threads_for,
)

WAYS = 4  # sums of a long row at a time


class Writer:
    """Writes one kernel over rows: its arguments are pairs of an address and a step from row to row, then how many rows
    there are, groups in a row, and numbers in a group, and something of the kernel's own."""

    def __init__(self, on: Processor, name: str, addresses: int) -> None:
        self.on, self.module = on, new_module()
        kinds = [ADDRESS, LONG] * addresses + [LONG] * 4
        self.f = Function(self.module, f"share of {name}", [LONG, LONG, *kinds])
        self.b = self.f.builder
        thread, threads = self.f.arguments[:2]
        pairs = self.f.arguments[2:-4]
        rows, self.groups, self.width, self.own = self.f.arguments[-4:]
        first, last = share_of(self.b, rows, thread, threads)
        with self.f.loop(first, last) as (row, _, _):
            starts = [at(self.b, a, self.b.mul(row, step)) for a, step in zip(pairs[::2], pairs[1::2], strict=True)]
            getattr(self, name)(*starts)
        in_threads(self.module, name, self.f.end())

    def along(self, emit: Callable[[Lanes, Any], None]) -> None:
        along(self.f, self.on, long(0), self.width, emit)

    def norm(self, x: Any, out: Any, rstd: Any, weight: Any) -> None:
        """`own`: epsilon, as the bits of a float32."""
        b = self.b
        eps = given_number(b, self.own)
        with self.f.loop(long(0), self.groups) as (group, _, _):
            x, out = (at(b, a, b.mul(group, b.mul(self.width, long(NUMBER)))) for a in (x, out))
            squares = sum_along(
                self.f, self.on, self.width, lambda v, i, sum_: v.multiply_add(v.load(x, i), v.load(x, i), sum_)
            )
            mean = b.fdiv(squares, b.sitofp(self.width, FLOAT))
            root = b.call(declare(self.module, "llvm.sqrt.f32", [FLOAT], FLOAT), [b.fadd(mean, eps)])
            scale = b.fdiv(ir.Constant(FLOAT, 1.0), root)
            b.store(scale, at(b, rstd, b.mul(group, long(NUMBER))), align=NUMBER)

            def write(v: Lanes, i: Any) -> None:
                v.store(b.fmul(b.fmul(v.load(x, i), v.everywhere(scale)), v.load(weight, i)), out, i)

            self.along(write)

    def norm_backward(self, dy: Any, x: Any, rstd: Any, weight: Any, dx: Any) -> None:
        """Adds to dx."""
        b = self.b
        with self.f.loop(long(0), self.groups) as (group, _, _):
            dy, x, dx = (at(b, a, b.mul(group, b.mul(self.width, long(NUMBER)))) for a in (dy, x, dx))
            scale = number_at(b, rstd, group)

            def product(v: Lanes, i: Any) -> Any:
                return b.fmul(v.load(dy, i), v.load(weight, i))

            dots = sum_along(
                self.f, self.on, self.width, lambda v, i, sum_: v.multiply_add(product(v, i), v.load(x, i), sum_)
            )
            mean = b.fdiv(dots, b.sitofp(self.width, FLOAT))
            less = b.fneg(b.fmul(b.fmul(mean, scale), b.fmul(scale, scale)))

            def write(v: Lanes, i: Any) -> None:
                so_far = v.multiply_add(product(v, i), v.everywhere(scale), v.load(dx, i))
                v.store(v.multiply_add(v.load(x, i), v.everywhere(less), so_far), dx, i)

            self.along(write)

    def normalise(self, x: Any, lse: Any, top: Any) -> None:
        b = self.b
        largest = largest_along(self.f, self.on, self.width, lambda v, i: v.load(x, i), WAYS)
        total = sum_along(
            self.f,
            self.on,
            self.width,
            lambda v, i, sum_: b.fadd(sum_, v.exp(b.fsub(v.load(x, i), v.everywhere(largest)))),
            WAYS,
        )
        log = b.call(declare(self.module, "llvm.log.f32", [FLOAT], FLOAT), [total])
        b.store(b.fadd(largest, log), lse, align=NUMBER)
        b.store(largest, top, align=NUMBER)

    def probabilities(self, x: Any, lse: Any, factor: Any) -> None:
        """In place."""
        b = self.b
        less, times = number_at(b, lse, long(0)), number_at(b, factor, long(0))

        def write(v: Lanes, i: Any) -> None:
            power = v.exp(b.fsub(v.load(x, i), v.everywhere(less)))
            v.store(b.fmul(power, v.everywhere(times)), x, i)

        self.along(write)

    def swiglu(self, gate_up: Any, out: Any) -> None:
        up = at(self.b, gate_up, self.b.mul(self.width, long(NUMBER)))

        def write(v: Lanes, i: Any) -> None:
            gate = v.load(gate_up, i)
            v.store(self.b.fmul(self.b.fmul(gate, v.sigmoid(gate)), v.load(up, i)), out, i)

        self.along(write)

    def swiglu_backward(self, dy: Any, gate_up: Any, out: Any, d_gate_up: Any) -> None:
        b = self.b
        up, d_up = (at(b, a, b.mul(self.width, long(NUMBER))) for a in (gate_up, d_gate_up))

        def write(v: Lanes, i: Any) -> None:
            gate, above, one = v.load(gate_up, i), v.load(dy, i), v.number(1.0)
            sigmoid = v.sigmoid(gate)
            silu, ups = b.fmul(gate, sigmoid), v.load(up, i)
            v.store(b.fmul(silu, ups), out, i)
            v.store(b.fmul(above, silu), d_up, i)
            slope = b.fmul(sigmoid, v.multiply_add(gate, b.fsub(one, sigmoid), one))
            v.store(b.fmul(b.fmul(above, ups), slope), d_gate_up, i)

        self.along(write)

    def rotate(self, x: Any, cos: Any, sin: Any) -> None:
        """In place on the first 2 * width numbers of a group. `own`: a group's size, negative to turn back."""
        b = self.b
        back = b.icmp_signed("<", self.own, long(0))
        size = b.select(back, b.neg(self.own), self.own)
        sign = b.select(back, ir.Constant(FLOAT, -1.0), ir.Constant(FLOAT, 1.0))
        with self.f.loop(long(0), self.groups) as (group, _, _):
            first = at(b, x, b.mul(group, b.mul(size, long(NUMBER))))
            second = at(b, first, b.mul(self.width, long(NUMBER)))

            def write(v: Lanes, i: Any) -> None:
                one, other = v.load(first, i), v.load(second, i)
                c, s = v.load(cos, i), b.fmul(v.load(sin, i), v.everywhere(sign))
                v.store(b.fsub(b.fmul(one, c), b.fmul(other, s)), first, i)
                v.store(v.multiply_add(other, c, b.fmul(one, s)), second, i)

            self.along(write)


def usable(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and processor() is not None


def norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, rstd: Tensor) -> None:
    """x and out [rows, width] or [rows, groups, width]; rstd [rows, 1] or [rows, groups, 1], contiguous."""
    assert out.shape == x.shape
    assert rstd.is_contiguous()
    _run("norm", (x, out, rstd, weight), x.shape[0], _groups(x), x.shape[-1], bits_of(eps))


def norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, add_to: Tensor) -> None:
    """As norm has them, add_to shaped as x."""
    assert dy.shape == x.shape == add_to.shape
    assert rstd.is_contiguous()
    _run("norm_backward", (dy, x, rstd, weight, add_to), x.shape[0], _groups(x), x.shape[-1])


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """gate_up [rows, 2 * width], out [rows, width]."""
    assert gate_up.shape == (out.shape[0], 2 * out.shape[1])
    _run("swiglu", (gate_up, out), out.shape[0], 1, out.shape[1])


def swiglu_backward(dy: Tensor, gate_up: Tensor, out: Tensor, d_gate_up: Tensor) -> None:
    """dy and out [rows, width], the others [rows, 2 * width]."""
    assert dy.shape == out.shape
    assert gate_up.shape == d_gate_up.shape == (out.shape[0], 2 * out.shape[1])
    _run("swiglu_backward", (dy, gate_up, out, d_gate_up), out.shape[0], 1, out.shape[1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """x [rows, heads, dim], in place; cos and sin [rows, 1, half]."""
    dim = x.shape[-1]
    assert cos.shape == sin.shape == (x.shape[0], 1, cos.shape[-1])
    assert 2 * cos.shape[-1] <= dim
    _run("rotate", (x, cos, sin), x.shape[0], x.shape[1], cos.shape[-1], -dim if back else dim)


def normalise(x: Tensor, lse: Tensor, top: Tensor) -> None:
    """Each row's log-sum-exp and its largest number; NaN where one is. x [rows, width]; lse and top [rows, 1]."""
    assert lse.shape == top.shape == (x.shape[0], 1)
    _run("normalise", (x, lse, top), x.shape[0], 1, x.shape[1])


def probabilities(x: Tensor, lse: Tensor, factor: Tensor) -> None:
    """x = exp(x - lse) * factor, in place. x [rows, width]; lse and factor [rows, 1]."""
    assert lse.shape == factor.shape == (x.shape[0], 1)
    _run("probabilities", (x, lse, factor), x.shape[0], 1, x.shape[1])


def _groups(x: Tensor) -> int:
    """In a row of [rows, width] or [rows, groups, width]."""
    return x.shape[1] if x.dim() == 3 else 1


def _run(name: str, tensors: Sequence[Tensor], rows: int, groups: int, width: int, own: int = 0) -> None:
    arguments = []
    for tensor in tensors:
        shape, strides = tensor.shape, tensor.stride()
        assert strides[-1] == 1 or shape[-1] == 1
        assert len(shape) < 3 or groups == 1 or shape[1] == 1 or strides[1] == shape[2]
        arguments += (tensor.data_ptr(), 0 if len(shape) == 1 else NUMBER * strides[0])
    on = processor()
    assert on is not None
    _compiled(on, name, len(tensors))(threads_for(rows * groups * width), *arguments, rows, groups, width, own)


@once
def _compiled(on: Processor, name: str, addresses: int) -> Callable[..., None]:
    return compiled(Writer(on, name, addresses).module, name)
