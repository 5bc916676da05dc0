"""What the engine is asked and what it answers. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.errors import InputError, TunesmithError
from tunesmith.types import Message

FinishReason = Literal["stop", "length", "cancelled"]
MAX_TOP_LOGPROBS = 20
MAX_SAMPLES = 128


class BusyError(TunesmithError):
    """The queue is full; asking again later will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, as chat turns, as plain text or as token ids, and how to answer it.

    messages, tools       rendered by the base's chat template
    prompt                plain text, opened by the tokenizer's own special tokens, no template
    prompt_ids            exactly these tokens
    adapter               a registered adapter; None is the base alone
    max_tokens            None: up to the end of the base's context
    temperature           0 is greedy; else logits are divided by it
    top_p, top_k, min_p   keep the likeliest tokens of mass `top_p`; the `top_k` likeliest (0: all); those at least
                          `min_p` times as likely as the likeliest
    seed                  the same seed gives the same answer, whatever else is in the batch
    n                     how many answers to sample; those after the first are in `Answer.others`
    stop                  strings that end the answer and are not part of it
    logprobs              True: log-probability of each token; a number: that many likeliest alternatives as well
    presence_penalty, frequency_penalty    taken off the logits of tokens in the answer so far (once; per occurrence)
    repetition_penalty    logits of tokens in prompt and answer so far are divided by it where positive, else multiplied
    logit_bias            token id -> what to add to its logit
    schema, regex, choice, grammar         the answer matches this JSON Schema, regular expression, one of these
                                           strings, or Lark grammar; at most one of the four
    timeout               seconds after which the answer ends with what it has ("cancelled"), waiting included
    ignore_stop           go on to `max_tokens` whatever is generated (for timing)
    """

    messages: Sequence[Message] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    prompt: str | None = None
    prompt_ids: Sequence[int] | None = None
    adapter: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    logprobs: bool | int = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    schema: Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    timeout: float | None = None
    ignore_stop: bool = False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated. `ids` end in the stop token where one was generated; `text` has neither it nor stop strings.

    `logprobs[i]` is the natural log-probability of `ids[i]` by the model itself, before temperature and filters;
    `top_logprobs[i]` are the likeliest (token id, log-probability) pairs there.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt, those not computed again
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    others: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed answer: the text that became certain and the tokens since the last piece.

    The last piece of each of the `n` answers carries that answer whole.
    """

    text: str
    ids: list[int]
    index: int = 0
    answer: Answer | None = None


def check_request(request: Request) -> None:
    """Raises InputError for a request that makes no sense whatever the base."""
    given = [name for name in ("messages", "prompt", "prompt_ids") if getattr(request, name) is not None]
    if len(given) != 1:
        raise InputError(f"a request needs exactly one of messages, prompt and prompt_ids, not {given or 'none'}")
    if request.tools and request.messages is None:
        raise InputError("tools are rendered by the chat template; give messages with them")
    grammars = [name for name in ("schema", "regex", "choice", "grammar") if getattr(request, name) is not None]
    if len(grammars) > 1:
        raise InputError(f"an answer can be held to one of {', '.join(grammars)}, not to several")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise InputError(f"max_tokens is {request.max_tokens}; it must be at least 1")
    if not 1 <= request.n <= MAX_SAMPLES:
        raise InputError(f"n is {request.n}; it must lie between 1 and {MAX_SAMPLES}")
    if not 0 <= int(request.logprobs) <= MAX_TOP_LOGPROBS:
        raise InputError(f"logprobs is {request.logprobs}; at most {MAX_TOP_LOGPROBS} alternatives are given")
    if request.timeout is not None and not request.timeout > 0:
        raise InputError(f"timeout is {request.timeout}; it must be more than 0 seconds")
    if any(not stop for stop in request.stop_strings):
        raise InputError("an empty stop string would end every answer at once; leave it out")
    _check_ranges(request)


def _check_ranges(request: Request) -> None:
    ranges: dict[str, tuple[float, float]] = {
        "temperature": (0.0, 100.0),
        "top_p": (0.0, 1.0),
        "top_k": (0, math.inf),
        "min_p": (0.0, 1.0),
        "presence_penalty": (-2.0, 2.0),
        "frequency_penalty": (-2.0, 2.0),
        "repetition_penalty": (1e-3, 100.0),
    }
    for name, (low, high) in ranges.items():
        value = getattr(request, name)
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; it must lie between {low:g} and {high:g}")
    if request.top_p == 0.0:
        raise InputError("top_p is 0, which leaves no token to choose from; for greedy answers set temperature to 0")
    for token, bias in (request.logit_bias or {}).items():
        if not -100.0 <= bias <= 100.0:
            raise InputError(f"logit_bias of token {token} is {bias}; it must lie between -100 and 100")
