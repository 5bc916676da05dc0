"""The words of an honest prompt: what a careful person would write who knows the labels, the keys or the schema.

Every contender that prompts uses the wording that did best on training rows (choice.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from tunesmith.prove.answering import Prompt
from tunesmith.prove.task import Task
from tunesmith.types import Item, Message

MOST_KEYS = 40  # written out; beyond that the rarest are left unsaid


@dataclass(frozen=True, slots=True)
class Wording:
    """An instruction and where it stands: in the system turn, or after the question."""

    name: str
    text: str
    after_question: bool = False


@dataclass(frozen=True, slots=True)
class Shot:
    """A worked example: a question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Page:
    """How prompts are laid out for one base: chat turns, with or without a system turn, or plain text."""

    has_template: bool
    accepts_system: bool = True

    def write(self, item: Item, wording: Wording, shots: Sequence[Shot] = (), context: str = "") -> Prompt:
        """The item's prompt with the wording, worked examples as earlier turns, and context before the question."""
        if item.prompt is not None and not self.has_template:
            return Prompt(text=self._plain(item.prompt, wording, shots, context))
        turns = item.messages or ({"role": "user", "content": item.prompt or ""},)
        system = [turn for turn in turns if turn["role"] in ("system", "developer")]
        rest = [turn for turn in turns if turn["role"] not in ("system", "developer")]
        instruction = "" if wording.after_question else wording.text
        lead = "\n\n".join(text for text in (*(turn.get("content") or "" for turn in system), instruction) if text)
        earlier: list[Message] = []
        for shot in shots:
            earlier.append({"role": "user", "content": _question(shot.question, wording)})
            earlier.append({"role": "assistant", "content": shot.answer})
        messages = [*earlier, *_last_question_replaced(rest, wording, context)]
        return Prompt(messages=tuple(self._led(messages, lead)), tools=item.tools)

    def as_trained(self, item: Item, context: str = "") -> Prompt:
        """Exactly the prompt the model was trained on; with context, that before the last question."""
        if item.prompt is not None:
            return Prompt(text=context + item.prompt)
        turns = _last_question_replaced(list(item.messages), None, context) if context else item.messages
        return Prompt(messages=tuple(turns), tools=item.tools)

    def _led(self, messages: list[Message], lead: str) -> list[Message]:
        if not lead:
            return messages
        if self.accepts_system:
            return [{"role": "system", "content": lead}, *messages]
        first = next((i for i, turn in enumerate(messages) if turn["role"] == "user"), None)
        if first is None:
            return [{"role": "user", "content": lead}, *messages]
        return [
            _with_content(turn, f"{lead}\n\n{turn.get('content') or ''}") if i == first else turn
            for i, turn in enumerate(messages)
        ]

    def _plain(self, prompt: str, wording: Wording, shots: Sequence[Shot], context: str) -> str:
        """For a base without turns: instruction, examples as prompt and completion, then the prompt."""
        examples = [shot.question + shot.answer for shot in shots]
        return "\n\n".join(text for text in (wording.text, *examples, context.strip() + prompt) if text)


def wordings(task: Task) -> list[Wording]:
    """The wordings tried, the plainest first."""
    if task.kind == "json":
        return _json_wordings(task)
    if task.kind == "label":
        return _label_wordings(task)
    direct = f"Answer directly, in about {max(task.words, 1)} words, without any introduction."
    return [Wording("as given", ""), Wording("direct", direct), Wording("direct, last", direct, after_question=True)]


def _json_wordings(task: Task) -> list[Wording]:
    """The schema written out (in the system turn only: it is long, and there the engine computes it once), else the
    keys before or after the question; and a form to fill in.
    """
    keys = task.keys[:MOST_KEYS]
    copied = " Copy the values from the text, word for word." if task.copied else ""
    only = "all of them required" if len(task.always) == len(task.keys) else "only those that apply"
    by_keys = _as_json(f"Use these keys, {only}: {', '.join(keys)}.{copied}")
    blank = json.dumps(dict.fromkeys(keys, "..."), ensure_ascii=False)
    by_form = f"Fill in this JSON from the user's text, {only}.{copied}\n{blank}\nReply with the JSON and nothing else."
    if task.schema is None:
        return [Wording("keys", by_keys), Wording("keys, last", by_keys, True), Wording("form", by_form)]
    schema = json.dumps(task.schema, ensure_ascii=False, separators=(",", ":"))
    by_schema = Wording("schema", _as_json(f"It must satisfy this JSON Schema:\n{schema}\n{copied.strip()}"))
    return [by_schema, Wording("keys", by_keys), Wording("form", by_form)] if keys else [by_schema]


def _as_json(form: str) -> str:
    return f"Turn the user's text into one JSON object. {form}\nReply with the JSON object and nothing else."


def _label_wordings(task: Task) -> list[Wording]:
    listed = "\n".join(f"- {label}" for label in task.labels)
    full = (
        f"Classify the user's text. The labels are:\n{listed}\nReply with exactly one of these labels and nothing else."
    )
    short = f"Which one fits the text above: {', '.join(task.labels)}? Answer with that word only."
    return [
        Wording("list", full),
        Wording("list, last", full, after_question=True),
        Wording("question, last", short, after_question=True),
    ]


def _question(text: str, wording: Wording | None) -> str:
    return f"{text}\n\n{wording.text}" if wording is not None and wording.after_question and wording.text else text


def _last_question_replaced(turns: list[Message], wording: Wording | None, context: str) -> list[Message]:
    """The last user turn with context before it and, where the wording stands there, the instruction after it."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last is None:
        return turns
    text = context + _question(turns[last].get("content") or "", wording)
    return [_with_content(turn, text) if i == last else turn for i, turn in enumerate(turns)]


def _with_content(turn: Message, text: str) -> Message:
    return cast(Message, {**cast(dict[str, Any], turn), "content": text})
