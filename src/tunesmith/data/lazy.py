"""Sequences whose items are made when they are asked for, so that nothing holds all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class Lazy(Sequence[T]):
    """`count` items, item i being `make(i)`, each time anew: `Lazy(3, str)[1:]` is "1", "2"."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Lazy[T]: ...

    def __getitem__(self, index: int | slice) -> T | Lazy[T]:
        places = range(self._count)[index]
        if isinstance(places, range):
            return Lazy(len(places), lambda i: self._make(places[i]))
        return self._make(places)

    def __iter__(self) -> Iterator[T]:
        return map(self._make, range(self._count))


def picked(items: Sequence[T], numbers: npt.NDArray[np.int64]) -> Lazy[T]:
    """The items of these numbers, in their order."""
    return Lazy(len(numbers), lambda i: items[int(numbers[i])])


def evenly(items: Sequence[T], most: int) -> Lazy[T]:
    """At most so many of the items, spread evenly over them: 2 of a b c d e are a and c."""
    count = min(most, len(items))
    return Lazy(count, lambda i: items[i * len(items) // count])


def joined(first: Sequence[T], second: Sequence[T]) -> Lazy[T]:
    """The items of both, one after the other."""
    middle = len(first)
    return Lazy(middle + len(second), lambda i: first[i] if i < middle else second[i - middle])
