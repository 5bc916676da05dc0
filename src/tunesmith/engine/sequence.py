"""One sequence of tokens on its way through the engine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from tunesmith.engine.cache import Node, Tokens
from tunesmith.engine.request import FinishReason
from tunesmith.engine.sampling import Choice, Sampling

_numbers = itertools.count()


class Constraint(Protocol):
    """What the next tokens may be (engine/constraint.py)."""

    def allowed(self) -> Tensor:
        """[vocabulary] bool."""
        ...

    def accept(self, token: int) -> None:
        """The sequence goes on with `token`."""
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next, none where there is a choice."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing more may follow."""
        ...


@dataclass(eq=False)
class Sequence_:
    """What the core is asked to do: tokens in, and when to stop. Tokens [0, computed) are in the cache.

    adapter      its name in the model's LoRA layers, None for the base; `cache_key` tells its weights apart
    stop_ids     tokens that end the sequence; they are part of `generated`
    watch        sees `generated` after each new token; True ends the sequence (stop strings)
    """

    prompt: list[int]
    max_tokens: int
    adapter: str | None = None
    cache_key: object = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    watch: Callable[[list[int]], bool] | None = None
    constraint: Constraint | None = None
