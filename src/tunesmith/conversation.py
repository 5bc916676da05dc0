"""`tunesmith chat`: a base, a run or an adapter, answering through the one engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Answer, Request
from tunesmith.store.runs import locate
from tunesmith.types import Message

ADAPTER = "tuned"


@dataclass
class Conversation:
    """A history of turns with one model. `answer` is the last answer whole."""

    engine: Engine
    adapter: str | None
    temperature: float
    max_tokens: int
    history: list[Message] = field(default_factory=list)
    answer: Answer | None = None

    def ask(self, prompt: str) -> Iterator[str]:
        """Stream the answer to one more user turn, and keep both turns."""
        self.history.append({"role": "user", "content": prompt})
        request = Request(
            messages=list(self.history),
            adapter=self.adapter,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )
        pieces: list[str] = []
        for delta in self.engine.stream(request):
            pieces.append(delta.text)
            self.answer = delta.answer or self.answer
            yield delta.text
        self.history.append({"role": "assistant", "content": "".join(pieces)})

    def forget(self) -> None:
        """Start over, keeping a system prompt."""
        self.history = [message for message in self.history if message["role"] == "system"]


def open_conversation(model: str, *, system: str | None, temperature: float, max_tokens: int) -> Conversation:
    """Load what `model` names: a run (folder or name), an adapter folder, or a base. Raises InputError."""
    found = locate(model)
    engine = Engine(found.base, adapters={ADAPTER: found.adapter} if found.adapter else {})
    talk = Conversation(engine, ADAPTER if found.adapter else None, temperature, max_tokens)
    first = system if system is not None else found.system
    if first:
        talk.history.append({"role": "system", "content": first})
    return talk


def answer_facts(talk: Conversation, prompt: str) -> dict[str, Any]:
    """One question's answer as `--json` prints it."""
    text = "".join(talk.ask(prompt))
    assert talk.answer is not None
    return {
        "answer": text,
        "finish_reason": talk.answer.finish_reason,
        "prompt_tokens": talk.answer.prompt_tokens,
        "output_tokens": len(talk.answer.ids),
    }


def interactive(talk: Conversation) -> None:
    """Read questions from the terminal until end of input; /new starts over."""
    print("/new starts over, end of input (Ctrl-D) leaves", file=sys.stderr)
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if prompt == "/new":
            talk.forget()
        elif prompt:
            for piece in talk.ask(prompt):
                print(piece, end="", flush=True)
            print()
