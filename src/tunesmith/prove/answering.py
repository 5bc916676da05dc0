"""Asking a model: prompts in, replies out, each remembered so that a killed proof continues where it was.

The engine and an OpenAI-compatible endpoint (endpoint.py) are both a `Model`; what is asked is a contender's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.engine.completer import PromptRenderer
from tunesmith.engine.request import Request
from tunesmith.types import Message

if TYPE_CHECKING:
    from tunesmith.engine.request import Answer


Progress = Callable[[int, int], None]  # (answered, of how many)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given: chat turns with their tools, or plain text that no template touches."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `error` is set where nothing did; the reply then counts as an empty answer, and as a fault.

    `seconds` is the wall time of the batch it was answered in, divided by the batch's size.
    """

    output: str
    finish_reason: str  # stop | length | error
    prompt_tokens: int
    output_tokens: int
    seconds: float
    error: str | None = None
    ids: tuple[int, ...] = ()  # the tokens as they were generated, where they are known


def failed(error: str, prompt_tokens: int = 0) -> Reply:
    """A reply that never came."""
    return Reply("", "error", prompt_tokens, 0, 0.0, error)


class Model(Protocol):
    """Something that answers prompts."""

    def fingerprint(self, prompt: Prompt) -> str | None:
        """Names everything the reply depends on; None where that isn't known and nothing may be remembered."""
        ...

    def implied(self, prompt: Prompt, known: Mapping[str, Reply]) -> Reply | None:
        """The reply, where it follows from what another model replied; `known` is by fingerprint."""
        ...

    def answer(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Reply]:
        """One reply a prompt, in order; `progress` is told as they come."""
        ...


class AnsweringEngine(Protocol):
    """The part of `tunesmith.Engine` that proving needs; a scripted fake stands in for it in tests."""

    @property
    def renderer(self) -> PromptRenderer: ...

    @property
    def context_length(self) -> int: ...

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Answer]: ...

    def keeps(self, request: Request, ids: Sequence[int]) -> bool:
        """Whether the request's grammar would leave an answer chosen without it as it is, token for token."""
        ...

    def logprobs(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int], adapter: str | None = None
    ) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Weights:
    """One set of weights that can be asked: an engine, its adapter (None: the engine's own model), and their hash.

    Without a hash nothing that they say is remembered between runs.
    """

    engine: AnsweringEngine
    adapter: str | None = None
    hash: str | None = None


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Weights that answer greedily, up to `max_tokens`, decoding under `schema` where there is one."""

    weights: Weights
    max_tokens: int
    schema: dict[str, Any] | None = None

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.weights.engine.context_length

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens the engine will see."""
        renderer = self.weights.engine.renderer
        if prompt.text is not None:
            return renderer.completion_prompt_ids(prompt.text)
        return renderer.prompt_ids(prompt.messages, prompt.tools)

    def fits(self, prompt: Prompt) -> bool:
        """Whether the prompt leaves room for a whole answer."""
        return len(self.prompt_ids(prompt)) + self.max_tokens <= self.context_length

    def fingerprint(self, prompt: Prompt) -> str | None:
        """SHA-256 over weights, prompt ids, length and schema; decoding is always greedy."""
        if self.weights.hash is None:
            return None
        return _sha256([self.weights.hash, self.prompt_ids(prompt), self.max_tokens, self.schema])

    def implied(self, prompt: Prompt, known: Mapping[str, Reply]) -> Reply | None:
        """The reply without the schema, where the schema would not have changed a token of it."""
        if self.schema is None:
            return None
        reply = known.get(replace(self, schema=None).fingerprint(prompt) or "")
        if reply is None or not reply.ids:
            return None
        return reply if self.weights.engine.keeps(self._request(prompt, self.max_tokens), reply.ids) else None

    def answer(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Reply]:
        """One greedy reply a prompt. A prompt that leaves no room for an answer fails by itself, not the batch."""
        replies: dict[int, Reply] = {}
        requests: dict[int, Request] = {}
        for place, prompt in enumerate(prompts):
            length = len(self.prompt_ids(prompt))
            room = min(self.max_tokens, self.context_length - length)
            if room < 1:
                error = f"the prompt has {length} tokens, the base takes {self.context_length}"
                replies[place] = failed(error, length)
            else:
                requests[place] = self._request(prompt, room)
        if requests:
            began = time.perf_counter()
            answers = self.weights.engine.generate(list(requests.values()), progress)
            seconds = (time.perf_counter() - began) / len(requests)
            for place, answer in zip(requests, answers, strict=True):
                replies[place] = Reply(
                    output=_storable(answer.text),
                    finish_reason=answer.finish_reason,
                    prompt_tokens=answer.prompt_tokens,
                    output_tokens=len(answer.ids),
                    seconds=seconds,
                    ids=tuple(answer.ids),
                )
        return [replies[place] for place in range(len(prompts))]

    def _request(self, prompt: Prompt, max_tokens: int) -> Request:
        settings: dict[str, Any] = {"adapter": self.weights.adapter, "max_tokens": max_tokens, "schema": self.schema}
        if prompt.text is not None:
            return Request(prompt=prompt.text, **settings)
        return Request(messages=prompt.messages, tools=prompt.tools, **settings)


class ReplyCache:
    """Replies by fingerprint in an append-only JSONL file; a last line cut off by a kill is ignored."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._replies: dict[str, Reply] = {}
        if path is not None and path.exists():
            self._read(path)

    def answer(self, model: Model, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Reply]:
        """Replies from memory where the model has answered the same before, and from the model where not."""
        keys = [model.fingerprint(prompt) for prompt in prompts]
        replies = [self._known(model, *asked) for asked in zip(prompts, keys, strict=True)]
        unanswered = [place for place, reply in enumerate(replies) if reply is None]
        if unanswered:
            known = len(prompts) - len(unanswered)
            tell = None if progress is None else lambda done, of: progress(known + done, len(prompts))
            fresh = model.answer([prompts[place] for place in unanswered], tell)
            for place, reply in zip(unanswered, fresh, strict=True):
                replies[place] = reply
            self._remember({keys[place]: replies[place] for place in unanswered})
        return [reply for reply in replies if reply is not None]

    def _known(self, model: Model, prompt: Prompt, key: str | None) -> Reply | None:
        if key is None:
            return None
        return self._replies.get(key) or model.implied(prompt, self._replies)

    def _remember(self, fresh: dict[str | None, Reply | None]) -> None:
        kept = {key: reply for key, reply in fresh.items() if key is not None and reply is not None and not reply.error}
        self._replies |= kept
        if self._path is None or not kept:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for key, reply in kept.items():
                file.write(json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        whole = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    entry = json.loads(line)
                    key = entry.pop("key")
                    self._replies[key] = Reply(**{**entry, "ids": tuple(entry.get("ids", ()))})
                except (ValueError, KeyError, TypeError):
                    continue
        if whole < path.stat().st_size:  # or the next line would be glued to the torn one
            with path.open("rb+") as file:
                file.truncate(whole)


def _storable(text: str) -> str:
    """Lone surrogates can't be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
