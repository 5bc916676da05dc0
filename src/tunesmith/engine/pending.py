"""A request inside the engine: its generations, and what of their text was already given out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tunesmith.engine.completer import Completer, TextTracker
from tunesmith.engine.generation import Generation
from tunesmith.engine.request import Answer, Delta


@dataclass(eq=False)
class Pending:
    """The `n` generations of a request. `trackers` follow their text where streaming or stop strings need it."""

    index: int  # place among the requests it came with
    generations: Sequence[Generation]
    trackers: Sequence[TextTracker | None]

    def __post_init__(self) -> None:
        self._given = [0] * len(self.generations)  # characters given out
        self._given_ids = [0] * len(self.generations)
        self._ended = [False] * len(self.generations)

    @property
    def finished(self) -> bool:
        return all(generation.finish_reason is not None for generation in self.generations)

    @property
    def given(self) -> bool:
        """Whether every answer was streamed to its end."""
        return all(self._ended)

    def answer(self, completer: Completer) -> Answer:
        """The whole answer. Raises what ended a generation before its time."""
        first, *others = self._answers(completer)
        return replace(first, others=tuple(others))

    def deltas(self, completer: Completer) -> Iterator[Delta]:
        """What became certain since the last call; each generation's last piece carries its answer."""
        for index, (generation, tracker) in enumerate(zip(self.generations, self.trackers, strict=True)):
            if self._ended[index]:
                continue
            assert tracker is not None
            _raise(generation)
            finished = generation.finish_reason is not None  # read before the tokens: another thread may add some
            ids = generation.generated[self._given_ids[index] :]
            answer = completer.answer(generation, tracker) if finished else None
            if answer is None:
                tracker.see(generation.generated)
            text = (tracker.certain if answer is None else answer.text)[self._given[index] :]
            if ids or answer is not None:
                self._given[index] += len(text)
                self._given_ids[index] += len(ids)
                self._ended[index] = finished
                yield Delta(text, ids, index, answer)

    def _answers(self, completer: Completer) -> Iterator[Answer]:
        for generation, tracker in zip(self.generations, self.trackers, strict=True):
            _raise(generation)
            yield completer.answer(generation, tracker)


def _raise(generation: Generation) -> None:
    if generation.error is not None:
        raise generation.error
