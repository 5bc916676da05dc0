"""Who waits, and whose turn it is: callers take turns, so that one with a thousand requests cannot hold up the rest."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

from tunesmith.engine.generation import Generation


class Queue:
    """Waiting generations. Each caller's are served in their order, the callers one after the other."""

    def __init__(self) -> None:
        self._returned: deque[Generation] = deque()  # had begun, and gave way; they go first
        self._lines: OrderedDict[object, deque[Generation]] = OrderedDict()  # by caller, the next one first

    def __len__(self) -> int:
        return len(self._returned) + sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Generation]:
        """All; the next one first, then those of the same caller."""
        return itertools.chain(self._returned, *self._lines.values())

    @property
    def head(self) -> Generation:
        """Whose turn it is."""
        return next(iter(self))

    def extend(self, generations: Iterable[Generation]) -> None:
        for generation in generations:
            self._lines.setdefault(generation.caller, deque()).append(generation)

    def give_back(self, generation: Generation) -> None:
        """One that had begun goes on before all others."""
        self._returned.appendleft(generation)

    def pop_head(self) -> None:
        """It begins; the next caller's turn comes."""
        if self._returned:
            self._returned.popleft()
            return
        caller, line = next(iter(self._lines.items()))
        line.popleft()
        if line:
            self._lines.move_to_end(caller)
        else:
            del self._lines[caller]

    def remove(self, generation: Generation) -> None:
        if generation in self._returned:
            self._returned.remove(generation)
            return
        line = self._lines[generation.caller]
        line.remove(generation)
        if not line:
            del self._lines[generation.caller]
