"""The two halves of an example: what is asked, and what must be answered."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from tunesmith.types import Example, Message

LONGEST_LABEL = 60  # characters
MOST_LABELS = 200
FEWEST_A_LABEL = 5  # different inputs, on average
STANDING_ROLES = ("system", "developer")


def asked_turns(example: Example) -> tuple[Message, ...]:
    """The turns the model is given: all before the last assistant turn, or the shared prompt of a preference."""
    return example.messages[:-1] if example.kind == "chat" else example.messages


def preamble(example: Example) -> str:
    """The standing instructions: system and developer turns."""
    return "\n".join(m.get("content") or "" for m in asked_turns(example) if m["role"] in STANDING_ROLES)


def front(example: Example) -> str:
    """What stands before the question: standing instructions and earlier turns."""
    turns = asked_turns(example)
    last = max((i for i, turn in enumerate(turns) if turn["role"] not in STANDING_ROLES), default=len(turns))
    return "\n".join(said(turn) for turn in turns[:last])


def input_text(example: Example) -> str:
    """What is asked, without standing instructions. A text row's text; the answer where nothing is asked."""
    if example.kind == "text":
        return example.text or ""
    if example.kind == "completion":
        return example.prompt or answer_text(example)
    turns = (said(message) for message in asked_turns(example) if message["role"] not in STANDING_ROLES)
    return "\n".join(turns) or answer_text(example)


def answer_text(example: Example) -> str:
    """What must be answered: the last assistant turn, the completion, the chosen turn; "" for a text or an input."""
    if example.kind == "completion":
        return example.completion or ""
    if example.kind in ("text", "input"):
        return ""
    return said(example.messages[-1] if example.kind == "chat" else example.chosen[-1])


def said(message: Message) -> str:
    """A turn's content, or its tool calls as JSON where it has none."""
    content = message.get("content")
    calls = message.get("tool_calls")
    if content or not calls:
        return content or ""
    functions = [{"name": c["function"]["name"], "arguments": _parsed(c["function"]["arguments"])} for c in calls]
    return json.dumps(functions, ensure_ascii=False)


def _parsed(arguments: str) -> object:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def labels(examples: Sequence[Example]) -> list[str] | None:
    """Each example's answer, where the answers are a few short labels; None for any other task.

    At most 200 labels of at most 60 characters (by the median), and five different inputs a label on average.
    """
    names: dict[str, str] = {}  # equal answers are one string, however many rows have them
    different: set[int] = set()  # hashes of what is asked and answered
    answers: list[str] = []
    for example in examples:
        answer = answer_text(example).strip()
        if not answer or answer.startswith(("{", "[")) or len(names) > MOST_LABELS:
            return None
        answers.append(names.setdefault(answer, answer))
        if len(different) < FEWEST_A_LABEL * MOST_LABELS:
            different.add(hash((input_text(example), answer)))
    if not 2 <= len(names) <= MOST_LABELS or len(different) < FEWEST_A_LABEL * len(names):
        return None
    return answers if statistics.median(map(len, answers)) <= LONGEST_LABEL else None
