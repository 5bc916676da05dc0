"""The nouns that travel between packages. No torch here: importing this must stay instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt


class Message(TypedDict):
    """One chat turn in OpenAI's shape. `weight` 0 on an assistant turn keeps it out of training."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[int]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row came from: file as the user named it, line 1-based (row number for Parquet and JSON arrays)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file} line {self.line}"


@dataclass(frozen=True, slots=True)
class Example:
    """One row of the user's data, whatever format it was read from. Exactly one of these shapes:

    chat        `messages` ending in an assistant turn       (messages, input_output, prompt_completion of turns)
    completion  `prompt` and `completion`, no template  (prompt_completion of strings)
    text        `text`                                       (text)
    preference  `messages` the shared prompt, `chosen` and `rejected` the two continuations
    input       `messages` ending in a user turn: a teacher will answer   (the first two formats, without an answer)
    """

    id: str  # hex digest of the content: equal rows have equal ids
    source: Source
    kind: Literal["chat", "completion", "text", "preference", "input"]
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)  # every other column of the row


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids and, built together with them, how much each is worth as a target.

    `weights[i]` is the loss weight of predicting `input_ids[i]` from what precedes it; `weights[0]` is always 0.
    `columns` holds per-token or per-example precomputed values (reference log-probs, teacher top-k).
    """

    example_id: str
    input_ids: npt.NDArray[np.int32]  # [tokens]
    weights: npt.NDArray[np.float32]  # [tokens]
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Item:
    """A held-out row as the contenders meet it: a prompt, and the answer expected (None if the row has none).

    A chat row gives `messages`: all turns before the last assistant turn; a completion row gives `prompt`.
    """

    id: str
    source: Source
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    expected: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the data gate has to say."""

    rule: str  # kebab-case, e.g. "split-leak"
    severity: Literal["block", "warn", "info"]
    reason: str
    remedy: str
    file: str | None = None
    lines: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% confidence interval over `n` items."""

    mean: float
    ci: tuple[float, float]
    n: int
