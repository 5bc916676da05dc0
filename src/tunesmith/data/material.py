"""What the gate's rules look at, and what they say."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

from tunesmith.data.lazy import Lazy, joined
from tunesmith.data.minhash import Labels
from tunesmith.data.parts import answer_text, input_text, labels
from tunesmith.recipe import Data
from tunesmith.types import Example, Source

if TYPE_CHECKING:
    from tunesmith.chat.renderer import Renderer

T = TypeVar("T")
MOST_HELD = 100_000  # rows


@dataclass(frozen=True)
class Note:
    """What a rule has to say about some rows. `remove`: those a cleaned copy leaves out."""

    rule: str
    severity: Literal["block", "warn", "info"]
    reason: str
    remedy: str
    sources: Sequence[Source] = ()
    remove: Sequence[Source] = ()


@dataclass(frozen=True)
class Material:
    """The rows of both sides, each source once, and whatever else a rule may need.

    `same` and `near` number equal and nearly equal inputs over `rows` = train + held_out. [rows]
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    same: Labels
    near: Labels
    data: Data
    renderer: Renderer | None = None
    limit: int | None = None

    @cached_property
    def rows(self) -> Sequence[Example]:
        return _held(joined(self.train, self.held_out))

    @cached_property
    def inputs(self) -> Sequence[str]:
        return _held(Lazy(len(self.rows), lambda i: input_text(self.rows[i])))

    @cached_property
    def answers(self) -> Sequence[str]:
        return _held(Lazy(len(self.rows), lambda i: answer_text(self.rows[i]).strip()))

    @cached_property
    def labels(self) -> list[str] | None:
        """Each row's label where this is a label task."""
        return labels(self.rows)

    def sources(self, numbers: Sequence[int]) -> list[Source]:
        return [self.rows[number].source for number in numbers]

    def with_labels(self, wanted: Collection[str]) -> list[Source]:
        """The rows that have one of these labels."""
        assert self.labels is not None
        return [row.source for row, label in zip(self.rows, self.labels, strict=True) if label in wanted]


def _held(items: Sequence[T]) -> Sequence[T]:
    """The rules look at every row a dozen times: so many are decoded once, of more each is decoded every time."""
    return [*items] if len(items) <= MOST_HELD else items
