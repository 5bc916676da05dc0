"""A run of kernels watched once and played again by a single call, in other memory.

What a decoder does for a few rows takes longer in the interpreter than in the kernels. These are told addresses and
sizes only, so the same calls with some addresses replaced do the same with what lies there. All other memory they touch
must be where it was: what is allocated while one watches is kept with the tape, the rest is the caller's business.
Where anything but kernels computes, the tape says that it is not sound.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.cpu.writing import ADDRESS, LONG, WATCHED, Function, at, compiled, integer_at, long, new_module, once

Ints = npt.NDArray[np.int64]

MOST = 28  # arguments of a kernel
# Operations that compute nothing: they make room, or look at a tensor in another way.
IDLE = {
    *("empty", "empty_like", "new_empty", "detach", "alias", "view", "_unsafe_view", "reshape", "unflatten", "flatten"),
    *("transpose", "permute", "t", "slice", "select", "split", "unbind", "unsqueeze", "squeeze", "expand"),
    "as_strided",
}


class Tape:
    """Kernels in their order, with their arguments, and what must live as long as they are to be played."""

    def __init__(self) -> None:
        self.calls, self.kept, self.sound = array("q"), list[Any](), True
        self.tables: list[array[int]] = []  # what kernels were told the address of, and consists of addresses itself

    def note(self, address: int, arguments: tuple[int, ...]) -> None:
        assert len(arguments) <= MOST
        self.calls.extend((address, *arguments, *(0,) * (MOST - len(arguments))))

    def moved(self, addresses: Ints, sizes: Ints, own: int) -> Moved:
        """The calls in other memory. addresses [places, pieces], of which row `own` is where they were watched; sizes
        [pieces] in bytes. What does not point into a piece stays as it is."""
        assert self.sound
        for table in self.tables:
            there = _moved(np.frombuffer(table, np.int64), addresses, sizes, own)
            self.kept.append(there)
            copies = there.ctypes.data + np.arange(len(there)) * there.strides[0]
            copies[own] = table.buffer_info()[0]
            addresses, sizes = np.column_stack((addresses, copies)), np.append(sizes, there.strides[0])
        return Moved(self, _moved(np.frombuffer(self.calls, np.int64), addresses, sizes, own), own)


class Moved:
    """A tape's calls, in each of several places."""

    def __init__(self, tape: Tape, calls: Ints, own: int) -> None:
        """calls [places, numbers]"""
        self._tape, self._calls = tape, calls
        self._start, self._step, self._count = calls.ctypes.data, calls.strides[0], calls.shape[1] // (MOST + 1)
        # The kernels, and what of their arguments is replaced.
        self.signature = calls[own, :: MOST + 1].tobytes() + (calls != calls[own]).any(0).tobytes()

    def play(self, place: int) -> None:
        """Call all of them again, there."""
        _player()(self._start + place * self._step, self._count)


def _moved(numbers: Ints, addresses: Ints, sizes: Ints, own: int) -> Ints:
    """[numbers] -> [places, numbers]"""
    order = addresses[own].argsort()
    begins = addresses[own, order]
    piece = order[np.maximum(np.searchsorted(begins, numbers, "right") - 1, 0)]
    inside = numbers - addresses[own, piece]
    return np.ascontiguousarray(
        np.where((inside >= 0) & (inside < sizes[piece]), addresses[:, piece] + inside, numbers)
    )


@contextmanager
def watching() -> Iterator[Tape]:
    """Everything that kernels are called for in this thread meanwhile, on a tape."""
    tape = Tape()
    WATCHED.tape = tape
    try:
        with _Keeper(tape):
            yield tape
    finally:
        WATCHED.tape = None


class _Keeper(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.tape.kept.append(found)
        self.tape.sound &= func.overloadpacket.__name__ in IDLE
        return found


@once
def _player() -> Callable[..., None]:
    """Calls through addresses: a function that takes fewer arguments does not look at the others."""
    f = Function(new_module(), "play", [ADDRESS, LONG], inside=False)
    b, (calls, count) = f.builder, f.arguments
    with f.loop(long(0), count) as (i, _, _):
        call = at(b, calls, b.mul(i, long(8 * (MOST + 1))))
        kind = ir.FunctionType(ir.VoidType(), [LONG] * MOST)
        kernel = b.inttoptr(integer_at(b, call, long(0)), kind.as_pointer())
        b.call(kernel, [integer_at(b, call, long(n + 1)) for n in range(MOST)])
    return compiled(f.end().module, "play")
