"""A run of kernels watched once and played again by a single call.

What a decoder does for a few rows takes longer in the interpreter than in the kernels. These are told addresses and
sizes only, so the same calls do the same again with whatever lies there by then. All memory they touch must be where
it was: what is allocated while one watches is kept with the tape, the rest is the caller's business. Where anything
but kernels computes, the tape says that it is not sound.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.cpu.writing import ADDRESS, LONG, WATCHED, Function, at, compiled, integer_at, long, new_module, once

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
        self.calls, self.count, self.kept, self.sound = array("q"), 0, list[Any](), True

    def note(self, address: int, arguments: tuple[int, ...]) -> None:
        assert len(arguments) <= MOST
        self.calls.extend((address, *arguments, *(0,) * (MOST - len(arguments))))
        self.count += 1

    def play(self) -> None:
        """Call all of them again."""
        assert self.sound
        _player()(self.calls.buffer_info()[0], self.count)


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
