"""A contender: a way to answer an item. Most are a model and a way to write its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tunesmith.prove.answering import Model, Progress, Prompt, Reply, ReplyCache
from tunesmith.types import Item

Kind = Literal["prompt", "retrieval", "tuned", "previous", "endpoint", "classifier"]


class Contender(Protocol):
    """`kind` is what the verdict's rules go by."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def answer(self, items: Sequence[Item], cache: ReplyCache, progress: Progress | None = None) -> list[Reply]:
        """One reply an item, in order; `progress` is told as they come."""
        ...


@dataclass(frozen=True, slots=True)
class Prompted:
    """Writes a prompt for each item and asks a model."""

    name: str
    kind: Kind
    model: Model
    write: Callable[[Item], Prompt]

    def answer(self, items: Sequence[Item], cache: ReplyCache, progress: Progress | None = None) -> list[Reply]:
        return cache.answer(self.model, [self.write(item) for item in items], progress)
