"""The bridge from requests to token ids and back: the only part of the engine that sees messages and text."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.engine.constraint import Grammars
from tunesmith.engine.generation import Generation
from tunesmith.engine.request import Answer, Request, check_request
from tunesmith.engine.sampling import Sampling
from tunesmith.errors import InputError
from tunesmith.types import Message

WINDOW = 8  # tokens decoded before the new ones, so that spaces come out as in the whole text
LONGEST_CHARACTER = 4  # tokens that one character may be spread over (UTF-8)


class PromptRenderer(Protocol):
    """The part of chat.Renderer that the engine and those who ask it need."""

    stop_ids: frozenset[int]

    @property
    def has_template(self) -> bool: ...

    @property
    def vocab_size(self) -> int: ...

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]: ...

    def completion_prompt_ids(self, prompt: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TextTracker:
    """The text of a growing answer, found piece by piece. `certain` is the part that later tokens cannot change.

    It ends before the first stop string, before a character still incomplete, and before what may become a stop string.
    """

    def __init__(
        self, renderer: PromptRenderer, stops: Sequence[str] = (), stop_ids: frozenset[int] = frozenset()
    ) -> None:
        self._renderer, self._stops, self._stop_ids = renderer, tuple(stops), stop_ids
        self._done = 0  # tokens whose text is in `text`
        self.text = ""
        self.stopped = False

    def see(self, ids: list[int]) -> bool:
        """Take in new tokens; True once a stop string has appeared, which then ends the text."""
        end = len(ids) - (1 if ids and ids[-1] in self._stop_ids else 0)
        if self.stopped or end <= self._done:
            return self.stopped
        window = max(0, self._done - WINDOW)
        before = self._renderer.decode(ids[window : self._done])
        after = self._renderer.decode(ids[window:end])
        if after.endswith("\ufffd") and end - self._done < LONGEST_CHARACTER:
            return False
        searched = len(self.text)
        self.text += after[len(before) :]
        self._done = end
        places = [(self.text.find(stop, max(0, searched - len(stop))), stop) for stop in self._stops]
        found = [place for place, _ in places if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self.stopped

    @property
    def certain(self) -> str:
        if self.stopped:
            return self.text
        held = max((n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        return self.text[: len(self.text) - held]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a base takes."""

    context_length: int  # tokens
    vocabulary: int  # rows of its output head


class Completer:
    """Turns requests into generations and what was generated into answers."""

    def __init__(self, renderer: PromptRenderer, limits: Limits, grammars: Grammars) -> None:
        self.renderer, self.limits, self.grammars = renderer, limits, grammars

    def prompt_ids(self, request: Request) -> list[int]:
        """The tokens of a request's prompt. Raises InputError."""
        if request.messages is not None:
            if not request.messages:
                raise InputError("messages is empty; give at least one turn")
            return self.renderer.prompt_ids(request.messages, [dict(tool) for tool in request.tools])
        if request.prompt is not None:
            return self.renderer.completion_prompt_ids(request.prompt)
        assert request.prompt_ids is not None
        return [int(token) for token in request.prompt_ids]

    def check_tokens(self, ids: Sequence[int], what: str) -> None:
        """Raises InputError where the base has no such tokens, or not room for as many."""
        if not ids:
            raise InputError(f"the {what} is empty; a base needs at least one token to go on from")
        wrong = next((token for token in ids if not 0 <= token < self.limits.vocabulary), None)
        if wrong is not None:
            raise InputError(f"the {what} holds token {wrong}; the base has 0 to {self.limits.vocabulary - 1}")
        if len(ids) > self.limits.context_length:
            raise InputError(f"the {what} has {len(ids)} tokens, but the base takes {self.limits.context_length}")

    def keeps(self, request: Request, ids: Sequence[int]) -> bool:
        """See Engine.keeps."""
        constraint = self.grammars.constraint(request)
        return constraint is None or constraint.keeps(ids, self.renderer.stop_ids)

    def generations(self, request: Request, cache_key: object, caller: object) -> list[Generation]:
        """One for each of the `n` samples. Raises InputError."""
        check_request(request)
        prompt = self.prompt_ids(request)
        self.check_tokens(prompt, "prompt")
        room = self.limits.context_length - len(prompt)
        if room < 1:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, which fills the base's {self.limits.context_length} and leaves "
                "no room for an answer"
            )
        return [
            Generation(
                prompt=prompt,
                max_tokens=min(request.max_tokens or room, room),
                adapter=request.adapter,
                cache_key=cache_key,
                sampling=self._sampling(request),
                stop_ids=frozenset() if request.ignore_stop else self.renderer.stop_ids,
                seed=None if request.seed is None else request.seed + index,
                constraint=self.grammars.constraint(request),
                deadline=math.inf if request.timeout is None else time.monotonic() + request.timeout,
                caller=caller,
            )
            for index in range(request.n)
        ]

    def tracker(self, request: Request, streaming: bool, generation: Generation) -> TextTracker | None:
        """Follows a generation's text where it is streamed or stop strings may end it."""
        stops = request.stop_strings
        if not (stops or streaming):
            return None
        tracker = TextTracker(self.renderer, stops, generation.stop_ids)
        if stops:
            generation.watch = tracker.see
        return tracker

    def answer(self, generation: Generation, tracker: TextTracker | None) -> Answer:
        """What a finished generation has to say."""
        assert generation.finish_reason is not None
        ids = list(generation.generated)
        if tracker is not None and tracker.stopped:
            text = tracker.text
        else:
            text = self.renderer.decode(ids[:-1] if ids and ids[-1] in generation.stop_ids else ids)
        sampling, choices = generation.sampling, generation.choices
        return Answer(
            text=text,
            ids=ids,
            finish_reason=generation.finish_reason,
            prompt_tokens=len(generation.prompt),
            cached_tokens=generation.cached_tokens,
            logprobs=[c.logprob for c in choices if c.logprob is not None] if sampling.logprobs else None,
            top_logprobs=[list(c.top) for c in choices] if sampling.top_logprobs else None,
        )

    def _sampling(self, request: Request) -> Sampling:
        return Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=self._bias(request.logit_bias or {}),
            logprobs=request.logprobs is not False,
            top_logprobs=0 if isinstance(request.logprobs, bool) else request.logprobs,
        )

    def _bias(self, biases: Mapping[int, float]) -> dict[int, float]:
        for token in biases:
            if not 0 <= int(token) < self.limits.vocabulary:
                raise InputError(f"logit_bias names token {token}; the base has 0 to {self.limits.vocabulary - 1}")
        return {int(token): float(value) for token, value in biases.items()}
