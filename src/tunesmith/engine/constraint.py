"""Answers held to a JSON Schema, a regular expression, a choice or a Lark grammar, by llguidance."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence

import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunesmith.engine.request import Request
from tunesmith.errors import InputError

# Between JSON's tokens: one space, or a line's end with its indentation. Without a bound a base may go on for ever.
WHITESPACE = r"( |\n {0,32})"
KEPT_GRAMMARS = 64


class Grammars:
    """Compiles requests' grammars for one tokenizer, and keeps the latest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop_ids: Iterable[int], vocabulary: int) -> None:
        """`vocabulary` is the number of rows of the base's head, which may be more than the tokenizer has."""
        self._hf_tokenizer, self._stop_ids, self._vocabulary = tokenizer, sorted(stop_ids), vocabulary
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def constraint(self, request: Request) -> GrammarConstraint | None:
        """A fresh constraint for one answer; None where the request has none. Raises InputError."""
        text = _grammar(request)
        if text is None:
            return None
        if text not in self._compiled:
            self._compiled[text] = self._compile(text)
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(text)
        return GrammarConstraint(self._compiled[text].deep_copy(), self._vocabulary)

    def _compile(self, text: str) -> LLMatcher:
        if self._hf_tokenizer is None:
            raise InputError("this engine was made without a tokenizer, so it cannot hold answers to a grammar")
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = from_tokenizer(self._hf_tokenizer, eos_token=self._stop_ids)  # type: ignore[arg-type]
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise InputError(f"no answer can be held to this grammar: {_first_line(matcher.get_error())}")
        return matcher


class GrammarConstraint:
    """What may come next in one answer (implements generation.Constraint)."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> Tensor:
        """[vocabulary] bool."""
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[: self._vocabulary]
        allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
        allowed[: len(bias)] = bias != 0
        return allowed

    def keeps(self, ids: Sequence[int], stop_ids: Container[int]) -> bool:
        """Whether an answer chosen freely would be chosen under this constraint too; spends it.

        Under greedy decoding that is so where no token of it is refused and none that is forced is another.
        """
        forced: list[int] = []
        for token in ids:
            if forced:
                if token != forced.pop(0):
                    return False
            elif token in stop_ids:
                return self.finished or bool(self.allowed()[token])
            elif self.finished or not self.allowed()[token]:
                return False
            self.accept(token)
            forced = forced or self.forced()
        return not forced

    def accept(self, token: int) -> None:
        """The answer goes on with `token`. Raises InputError where the grammar became too complex to follow."""
        if not self._matcher.consume_token(token):
            raise InputError(f"the answer's grammar cannot be followed: {_first_line(self._matcher.get_error())}")

    def forced(self) -> list[int]:
        """The tokens that must come next."""
        return self._matcher.compute_ff_tokens()

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()


def _grammar(request: Request) -> str | None:
    """The request's grammar in llguidance's own form."""
    if request.schema is not None:
        if request.schema is False:
            raise InputError("schema is false, which no answer satisfies")
        schema = {} if request.schema is True else dict(request.schema)
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    if request.regex is not None:
        return LLMatcher.grammar_from_regex(request.regex)
    if request.choice is not None:
        if not request.choice or not all(request.choice):
            raise InputError("choice needs at least one string, and none of them empty")
        options = " | ".join(json.dumps(option, ensure_ascii=False) for option in request.choice)
        return LLMatcher.grammar_from_lark(f"start: {options}")
    return None if request.grammar is None else LLMatcher.grammar_from_lark(request.grammar)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0].rstrip(".") if message.strip() else "unknown reason"
