"""`tunesmith chat`: a base, a run or an adapter, answering through the one engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Answer, Request
from tunesmith.errors import InputError
from tunesmith.store.runs import Run, find_run, read_json
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
    base, adapter, default_system = locate(model)
    engine = Engine(base, adapters={ADAPTER: str(adapter)} if adapter else {})
    talk = Conversation(engine, ADAPTER if adapter else None, temperature, max_tokens)
    first = system if system is not None else default_system
    if first:
        talk.history.append({"role": "system", "content": first})
    return talk


def locate(model: str) -> tuple[str, Path | None, str | None]:
    """What a name stands for: (base, adapter folder or None, the system prompt it was trained with or None)."""
    path = Path(model)
    if (path / "adapter_config.json").is_file():
        run = Run(path.resolve().parent)
        if run.exists():
            return _of_run(run)
        return read_json(path / "adapter_config.json")["base_model_name_or_path"], path, None
    if Run(path).exists():
        return _of_run(Run(path))
    try:
        return _of_run(find_run(model))
    except InputError:
        return model, None, None


def _of_run(run: Run) -> tuple[str, Path | None, str | None]:
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    tuned = run.tuned()
    system = recipe["data"]["system"]
    return (str(tuned), None, system) if tuned == run.model else (recipe["base"]["model"], tuned, system)


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
