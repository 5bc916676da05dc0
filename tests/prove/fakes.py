"""A scripted engine and a character renderer: a proof without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tunesmith.engine.request import Answer, Request
from tunesmith.types import Example, Message, Source

STOP = 3


class FakeRenderer:
    """One token a character, offset by 10; a turn is `<role>text` and a stop."""

    has_template = True
    template_hash = "fake"
    stop_ids = frozenset({STOP})
    vocab_size = 0x110000 + 10

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [ord(c) + 10 for c in f"<{message['role']}>{message.get('content') or ''}"] + [STOP]
        return ids

    def completion_prompt_ids(self, prompt: str) -> list[int]:
        return [1, *(ord(c) + 10 for c in prompt)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i - 10) for i in ids if i >= 10)


class FakeEngine:
    """`script(adapter, question, request)` gives the text; a token costs an adapter `surprise` nats."""

    def __init__(
        self, script: Callable[[str | None, str, Request], str], surprise: dict[str | None, float] | None = None
    ) -> None:
        self.script, self.surprise = script, surprise or {}
        self.asked: list[Request] = []
        self.renderer = FakeRenderer()
        self.context_length = 100_000

    def generate(self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None) -> list[Answer]:
        answers = []
        for request in requests:
            answers.append(self._answer(request))
            if progress is not None:
                progress(len(answers), len(requests))
        return answers

    def keeps(self, request: Request, ids: Sequence[int]) -> bool:
        return False

    def logprobs(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], adapter: str | None = None) -> list[float]:
        return [-self.surprise.get(adapter, 1.0)] * len(answer_ids)

    def _answer(self, request: Request) -> Answer:
        self.asked.append(request)
        if request.messages is not None:
            question = next(m["content"] for m in reversed(request.messages) if m["role"] == "user")
            ids = self.renderer.prompt_ids(request.messages)
        elif request.prompt is not None:
            question, ids = request.prompt, self.renderer.completion_prompt_ids(request.prompt)
        else:
            ids = list(request.prompt_ids or ())
            question = "".join(chr(i - 10) for i in ids if i >= 10)
        text = self.script(request.adapter, question or "", request)
        answer = [ord(c) + 10 for c in text] + [STOP]
        cut = answer[: request.max_tokens or math.inf.__hash__()]
        done = len(cut) == len(answer)
        shown = "".join(chr(i - 10) for i in cut if i != STOP)
        return Answer(text=shown, ids=cut, finish_reason="stop" if done else "length", prompt_tokens=len(ids))


def chat_row(number: int, question: str, answer: str, **columns: object) -> Example:
    """One row of two turns."""
    messages: tuple[Message, ...] = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )
    return Example(f"{number:08x}", Source("rows.jsonl", number + 1), "chat", messages, columns=columns)
