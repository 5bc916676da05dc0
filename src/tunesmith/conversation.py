"""`tunesmith chat`: a base, a run or an adapter, through the one engine; others over the same base join in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tunesmith.engine.opening import AnyEngine, open_engine
from tunesmith.engine.request import Answer, Request
from tunesmith.errors import InputError
from tunesmith.recipe import Quantize
from tunesmith.store.runs import locate
from tunesmith.types import Message

NONE = "none"  # what the base alone is called
HELP = """\
/adapter NAME   go on with another adapter, run or adapter folder over this base; none: the base alone
/base           answer every question by the base as well, beside the adapter; again: no longer
/system TEXT    another system prompt (none where TEXT is left out); starts over
/new            start over
end of input (Ctrl-D) leaves; Ctrl-C stops an answer"""


@dataclass
class Conversation:
    """A history of turns with one base and the adapters on it. `answer` is the last answer whole.

    `adapter` says who answers, None for the base; the history keeps its answers. With `beside` the base is asked too.
    """

    engine: AnyEngine
    base: str
    temperature: float
    max_tokens: int
    adapter: str | None = None
    quantize: Quantize | None = None  # of the base
    system: str | None = None
    beside: bool = False
    adapters: set[str] = field(default_factory=set)
    turns: list[Message] = field(default_factory=list)
    answer: Answer | None = None

    @property
    def speaker(self) -> str:
        return self.adapter or NONE

    def ask(self, prompt: str) -> Iterator[str]:
        """Stream the answer to one more user turn, and keep both turns once it is whole."""
        pieces: list[str] = []
        for piece in self._stream(prompt, self.adapter):
            pieces.append(piece)
            yield piece
        self.turns.append({"role": "user", "content": prompt})
        self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def ask_base(self, prompt: str) -> Iterator[str]:
        """Stream what the base alone says to the same, and keep nothing."""
        yield from self._stream(prompt, None)

    def switch(self, name: str) -> None:
        """Let another adapter over the same base answer from now on. Raises InputError."""
        if name != NONE and name not in self.adapters:
            found = locate(name)
            if found.adapter is None:
                known = ", ".join([*sorted(self.adapters), NONE])
                raise InputError(f'"{name}" is no adapter and no run with one; known here: {known}')
            if found.base != self.base:
                raise InputError(f'"{name}" stands on {found.base}, not on {self.base}; open it with tunesmith chat')
            if found.quantize != self.quantize:
                raise InputError(
                    f'"{name}" stands on {found.base} {_kept(found.quantize)}, and here it is {_kept(self.quantize)}; '
                    "open it with tunesmith chat"
                )
            self.engine.add_adapter(name, found.adapter)
            self.adapters.add(name)
        self.adapter = None if name == NONE else name

    def start_over(self, system: str | None) -> None:
        """Forget all turns."""
        self.system = system
        self.turns.clear()

    def _stream(self, prompt: str, adapter: str | None) -> Iterator[str]:
        standing: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        request = Request(
            messages=[*standing, *self.turns, {"role": "user", "content": prompt}],
            adapter=adapter,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )
        for delta in self.engine.stream(request):
            self.answer = delta.answer or self.answer
            yield delta.text


def open_conversation(
    model: str,
    *,
    system: str | None,
    temperature: float,
    max_tokens: int,
    beside: bool = False,
    vllm: str | None = None,
) -> Conversation:
    """Load what `model` names: a run (folder or name), an adapter folder, or a base. Raises InputError.

    `vllm` is the address of a server that answers in place of the own engine.
    """
    found = locate(model)
    adapters = {} if found.adapter is None else {model: found.adapter}
    engine = open_engine(found.base, vllm=vllm, adapters=adapters, quantize=found.quantize)
    talk = Conversation(engine, found.base, temperature, max_tokens, quantize=found.quantize, beside=beside)
    if found.adapter is not None:
        talk.adapter = model
        talk.adapters.add(model)
    talk.system = system if system is not None else found.system
    return talk


def _kept(quantize: Quantize | None) -> str:
    return "unquantised" if quantize is None else f"in {quantize}"


def answer_facts(talk: Conversation, prompt: str) -> dict[str, Any]:
    """One question's answer as `--json` prints it; under `base` the base's, where it is asked too."""
    base = _facts(talk, talk.ask_base(prompt)) if talk.beside else None
    return _facts(talk, talk.ask(prompt)) | ({} if base is None else {"base": base})


def speak(talk: Conversation, prompt: str) -> None:
    """Print the answer as it comes, and beside it the base's where that is asked for."""
    if not talk.beside:
        _print_pieces(talk.ask(prompt))
        return
    base = talk.ask_base(prompt)  # before the history goes on
    width = max(len(talk.speaker), len(NONE)) + 2
    _print_pieces(base, f"{NONE + ':':{width}}")
    _print_pieces(talk.ask(prompt), f"{talk.speaker + ':':{width}}")


def interactive(talk: Conversation) -> None:
    """Read questions and commands from the terminal until end of input."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        try:
            if line.startswith("/"):
                _obey(talk, line)
            elif line:
                _interruptible(lambda line=line: speak(talk, line))
        except InputError as error:  # of one question; the conversation goes on
            print(f"tunesmith: {error}", file=sys.stderr)


def _obey(talk: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/adapter" and rest:
        talk.switch(rest)
        said = f"answered by {talk.speaker}"
    elif command == "/adapter":
        said = f"answered by {talk.speaker}; known here: {', '.join([*sorted(talk.adapters), NONE])}"
    elif command == "/base":
        talk.beside = not talk.beside
        said = "the base is asked too" if talk.beside else "the base is no longer asked"
    elif command == "/system":
        talk.start_over(rest or None)
        said = f"system prompt: {talk.system or NONE}"
    elif command == "/new":
        talk.start_over(talk.system)
        said = "started over"
    else:
        said = HELP
    print(said, file=sys.stderr)


def _interruptible(work: Callable[[], None]) -> None:
    try:
        work()
    except KeyboardInterrupt:
        print(file=sys.stderr)


def _print_pieces(pieces: Iterator[str], label: str = "") -> None:
    print(label, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _facts(talk: Conversation, pieces: Iterator[str]) -> dict[str, Any]:
    text = "".join(pieces)
    assert talk.answer is not None
    return {
        "answer": text,
        "finish_reason": talk.answer.finish_reason,
        "prompt_tokens": talk.answer.prompt_tokens,
        "output_tokens": len(talk.answer.ids),
    }
