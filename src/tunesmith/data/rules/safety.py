"""Secrets, personal data, and text that tries to give orders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from tunesmith.data import wording
from tunesmith.data.material import Material, Note
from tunesmith.data.private import mask, personal_data, secrets
from tunesmith.types import Example, Source

INJECTED = re.compile(
    r"\b(?:ignore|disregard|forget|override)\s+(?:all\s+|any\s+|everything\s+)?(?:of\s+)?"
    r"(?:the\s+|your\s+|my\s+|these\s+)?"
    r"(?:previous|prior|above|preceding|earlier|system)\s+(?:instruction|prompt|message|rule|direction|command)s?"
    r"|\byou\s+are\s+now\s+(?:DAN\b|in\s+developer\s+mode|jailbroken|unrestricted)"
    r"|\b(?:reveal|print|repeat|show)\s+(?:me\s+)?your\s+(?:system|hidden|initial)\s+(?:prompt|instructions?)"
    r"|\bdo\s+anything\s+now\b",
    re.IGNORECASE,
)
INJECTED_WORDS = (
    "instruction",
    "prompt",
    "previous",
    "prior",
    "above",
    "you are now",
    "anything now",
    "rule",
    "message",
)
CONTROL = re.compile(r"<\|[\w ]{2,40}\|>|\[/?INST\]|<(?:start|end)_of_turn>|<<SYS>>|<(?:bos|eos|pad|unk)>")


def private_data(material: Material) -> Iterator[Note]:
    """Keys and passwords, and data about persons. Their kinds are named, never the values."""
    held: dict[str, list[Source]] = {"secrets": [], "personal-data": []}
    kinds: dict[str, Counter[str]] = {"secrets": Counter(), "personal-data": Counter()}
    for row in material.rows:
        for rule, find in (("secrets", secrets), ("personal-data", personal_data)):
            found = {span.kind for text in _texts(row) for span in find(text)}
            if found:
                held[rule].append(row.source)
                kinds[rule].update(found)
    for rule, sources in held.items():
        if sources:
            names = ", ".join(f"{kind} ({count:,})" for kind, count in kinds[rule].most_common())
            remedy = "take them out: what a model is trained on it may say to anyone"
            removed = sources if rule == "secrets" else ()
            yield Note(rule, "warn", f"{wording.rows(sources)} hold {names}", remedy, sources, remove=removed)


def injected_instructions(material: Material) -> Iterator[Note]:
    """Text that reads like an attack on a prompt."""
    sources: list[Source] = []
    shown = ""
    for row in material.rows:
        hit = next((hit for text in _texts(row) if (hit := _injection(text))), None)
        if hit:
            sources.append(row.source)
            shown = shown or mask(" ".join(hit.group().split()))
    if sources:
        reason = f'{wording.rows(sources)} hold text that looks like injected instructions, such as "{shown}"'
        yield Note("injected-instructions", "warn", reason, "remove them unless that is the task", sources)


def _injection(text: str) -> re.Match[str] | None:
    lowered = text.lower()
    return INJECTED.search(text) if any(word in lowered for word in INJECTED_WORDS) else None


def control_tokens(material: Material) -> Iterator[Note]:
    """Chat templates' own marks inside the text, from rows that were rendered once already."""
    sources: list[Source] = []
    marks: Counter[str] = Counter()
    for row in material.rows:
        found = {hit.group() for text in _texts(row) if "<" in text or "[" in text for hit in CONTROL.finditer(text)}
        if found:
            sources.append(row.source)
            marks.update(found)
    if sources:
        names = ", ".join(f'"{mark}"' for mark, _ in marks.most_common(5))
        reason = f"{wording.rows(sources)} hold marks of a chat template as text: {names}"
        yield Note(
            "control-tokens", "warn", reason, "give plain messages; the base's template adds its own marks", sources
        )


def _texts(row: Example) -> Iterator[str]:
    """All text of a row."""
    yield from (text for text in (row.prompt, row.completion, row.text) if text)
    for message in (*row.messages, *row.chosen, *row.rejected):
        if content := message.get("content"):
            yield content
        for call in message.get("tool_calls") or ():
            yield call["function"]["arguments"]
