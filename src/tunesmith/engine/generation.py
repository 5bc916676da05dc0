"""One sequence of tokens on its way through the engine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from tunesmith.engine.cache import Node, Tokens
from tunesmith.engine.request import FinishReason
from tunesmith.engine.sampling import Choice, Sampling
from tunesmith.engine.speculation import Guesser, Speculation
from tunesmith.errors import InputError


class Constraint(Protocol):
    """What may come next (engine/constraint.py)."""

    def allowed(self) -> Tensor:
        """[vocabulary] bool."""
        ...

    def accept(self, token: int) -> None:
        """The sequence goes on with `token`."""
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next; empty where there is a choice."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        ...


@dataclass(eq=False)
class Generation:
    """What to continue and how, and how far it is. With `max_tokens` 0 it only scores.

    adapter       its name in the model's LoRA layers, None for the base; `cache_key` tells weights apart
    stop_ids      tokens that end the generation; they are part of `generated`
    watch         sees `generated` after each new token; True ends the generation (stop strings)
    scored_from   place in the prompt from which on `scores` collects each token's log-probability
    deadline      by the monotonic clock, when it is cancelled, begun or not
    caller        who asked; callers take turns
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
    scored_from: int | None = None
    deadline: float = math.inf
    caller: object = None

    generated: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: InputError | None = None  # why it was ended before its time
    computed: int = 0  # tokens that went through the model for it

    # Where its keys and values are: the path that ends in `node`, then `tail` tokens in `slot`.
    node: Node | None = None
    slot: int = -1
    tail: int = 0
    guesser: Guesser | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._prompt: Tokens = np.array(self.prompt, dtype=np.int32)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def tokens(self) -> Tokens:
        """Prompt and answer so far."""
        if not self.generated:
            return self._prompt
        return np.concatenate([self._prompt, np.array(self.generated, dtype=np.int32)])

    def slice(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) without building them all."""
        split = len(self.prompt)
        if start >= split:
            return self.generated[start - split : stop - split]
        return (self.prompt[start:stop] + self.generated[: max(0, stop - split)])[: stop - start]

    def gap(self) -> Node | None:
        """The first node on its path that is not wholly computed."""
        assert self.node is not None
        if self.node.whole and (self.node.parent is None or self.tail):
            return None
        return next((node for node in self.node.path() if not node.whole), None)

    @property
    def reusable(self) -> int:
        """How many leading tokens may come from the cache: the first row whose output is needed is computed."""
        return self.length - 1 if self.scored_from is None else self.scored_from - 1

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that another generation had computed, or computes for both."""
        return max(0, self.length - 1 - self.computed)

    @property
    def guessable(self) -> bool:
        """Whether its tokens depend on nothing but the model, so that several may be checked at once."""
        sampling = self.sampling
        return self.constraint is None and self.scored_from is None and not (sampling.temperature or sampling.reshapes)

    def guess(self, speculation: Speculation, sequences: int, room: int) -> tuple[int, ...]:
        """What may come after its last token (see Guesser.guess)."""
        if not (self.guessable and self.generated):  # the first token need not wait until a long prompt is looked over
            return ()
        if self.guesser is None:
            self.guesser = Guesser(speculation, self.cache_key, self.prompt)
        self.guesser.see(self.generated)
        return tuple(self.guesser.guess(sequences, min(room, self.max_tokens - len(self.generated) - 1)))

    def allowed(self) -> Tensor | None:
        """See sampling.Samplable."""
        return None if self.constraint is None else self.constraint.allowed()

    def take(self, choice: Choice) -> None:
        """Go on with a token, and with those that then must follow; sets `finish_reason` at the end."""
        self._append(choice)
        if self.constraint is None or self.finish_reason is not None:
            return
        try:
            self._follow(self.constraint, choice.token)
        except InputError as error:
            self.error, self.finish_reason = error, "cancelled"

    def _follow(self, constraint: Constraint, token: int) -> None:
        constraint.accept(token)
        # A forced token's log-probability would need a row of its own, so it is chosen like any other where asked.
        for forced in () if self.sampling.logprobs else constraint.forced():
            self._append(Choice(forced))
            if self.finish_reason is not None:
                return
            constraint.accept(forced)
        if constraint.finished:
            self.finish_reason = "stop"

    def _append(self, choice: Choice) -> None:
        self.generated.append(choice.token)
        self.choices.append(choice)
        if choice.token in self.stop_ids or (self.watch is not None and self.watch(self.generated)):
            self.finish_reason = "stop"
        elif len(self.generated) >= self.max_tokens:
            self.finish_reason = "length"
