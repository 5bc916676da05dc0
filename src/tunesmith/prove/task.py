"""What kind of answer the rows expect: JSON, one of a few labels, or text. Read off the answers themselves."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.prove.json_answers import InvalidJson, parse_json
from tunesmith.types import Item

LONGEST_LABEL = 60  # characters
MOST_LABELS = 200


@dataclass(frozen=True, slots=True)
class Task:
    """The kind of answer, and what an honest prompt has to say about it."""

    kind: Literal["json", "label", "text"]
    labels: tuple[str, ...] = ()  # the most frequent first
    keys: tuple[str, ...] = ()  # top-level JSON keys, the most frequent first
    always: tuple[str, ...] = ()  # those of them that every answer has
    copied: bool = False  # JSON: nearly every string value stands word for word in the input
    words: int = 0  # median length of an answer
    schema: dict[str, Any] | None = None


def detect_task(items: Sequence[Item], schema: dict[str, Any] | None = None) -> Task:
    """Look at the expected answers of `items`; those without one don't count."""
    answered = [item for item in items if item.expected is not None]
    answers = [item.expected or "" for item in answered]
    if not answers:
        return Task("json" if schema else "text", schema=schema)
    words = round(statistics.median(len(answer.split()) for answer in answers))
    objects = _objects(answers)
    if objects is not None:
        counts = Counter(key for each in objects if isinstance(each, dict) for key in each)
        keys = tuple(sorted(counts, key=lambda key: (-counts[key], key)))
        always = tuple(key for key in keys if counts[key] == len(objects))
        return Task("json", keys=keys, always=always, copied=_copied(answered, objects), words=words, schema=schema)
    labels = Counter(answer.strip() for answer in answers)
    if _few_and_short(labels):
        return Task("label", labels=tuple(sorted(labels, key=lambda label: (-labels[label], label))), words=words)
    return Task("text", words=words, schema=schema)


def question(item: Item) -> str:
    """The last thing the user says, or the plain prompt: what retrieval searches by and pages show."""
    if item.prompt is not None:
        return item.prompt
    for message in reversed(item.messages):
        if message["role"] == "user":
            return message.get("content") or ""
    return ""


def _objects(answers: Sequence[str]) -> list[Any] | None:
    """The answers parsed, where every one of them is a JSON object or array."""
    objects: list[Any] = []
    for answer in answers:
        if not answer.lstrip().startswith(("{", "[")):
            return None
        try:
            objects.append(parse_json(answer))
        except InvalidJson:
            return None
    return objects


def _few_and_short(labels: Counter[str]) -> bool:
    """A label set repeats itself: at most 200 distinct one-line answers, each used about five times or more."""
    n = labels.total()
    return (
        all(0 < len(label) <= LONGEST_LABEL and "\n" not in label for label in labels)
        and len(labels) <= min(MOST_LABELS, max(2, n // 5))
        and len(labels) < n
    )


def _copied(items: Sequence[Item], objects: Sequence[Any]) -> bool:
    """True where 9 in 10 string values occur in the row's question, so that a prompt may say "copy"."""
    found = total = 0
    for item, value in zip(items, objects, strict=True):
        text = question(item)
        for string in _strings(value):
            total += 1
            found += string in text
    return total > 0 and found >= 0.9 * total


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [string for each in inner for string in _strings(each)]


def canonical(value: Any) -> str:
    """JSON with sorted keys, so that equal values are equal strings."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
