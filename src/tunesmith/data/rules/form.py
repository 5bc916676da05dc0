"""Is each row well formed: turns in order, known keys, tool calls that fit their tools?"""

from __future__ import annotations

import difflib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tunesmith.data import wording
from tunesmith.data.material import Material, Note
from tunesmith.data.schema import Schema
from tunesmith.types import Example, Message, Source

REASONING = ("reasoning_content", "reasoning", "thinking")  # read by the templates of reasoning models
MESSAGE_KEYS = frozenset(
    ("role", "content", "tool_calls", "tool_call_id", "name", "weight", "refusal", "audio", "annotations", *REASONING)
)
ROW_KEYS = ("messages", "tools", "parallel_tool_calls", "input", "output", "prompt", "completion", "chosen", "rejected")
ALIKE = 0.8  # difflib ratio from which a key is taken for a misspelling


def role_order(material: Material) -> Iterator[Note]:
    """A system turn after the start, or two turns of user or assistant running."""
    wrong: dict[str, list[Source]] = defaultdict(list)
    for row in material.rows:
        for fault in {*_order_faults(row.messages + row.chosen[:1])}:
            wrong[fault].append(row.source)
    for fault, sources in sorted(wrong.items()):
        reason = f"{wording.rows(sources)} with {fault}; many chat templates refuse that or print it wrongly"
        yield Note("role-order", "warn", reason, "join such turns, or mend their roles", sources)


def _order_faults(messages: tuple[Message, ...]) -> Iterator[str]:
    talk = [m["role"] for m in messages]
    start = next((i for i, role in enumerate(talk) if role not in ("system", "developer")), len(talk))
    if any(role in ("system", "developer") for role in talk[start:]):
        yield "a system turn that is not at the start"
    for before, after in pairwise(messages):
        if before["role"] == after["role"] == "user" or (
            before["role"] == after["role"] == "assistant" and not before.get("tool_calls")
        ):
            yield f"two {before['role']} turns running"


def unknown_keys(material: Material) -> Iterator[Note]:
    """Keys of a message nobody reads, and columns whose name is nearly that of one that is read."""
    strange: dict[str, list[Source]] = defaultdict(list)
    for row in material.rows:
        for message in row.messages:
            for key in message.keys() - MESSAGE_KEYS:
                strange[f'the message key "{key}"{_near(key, MESSAGE_KEYS)}'].append(row.source)
        for column in row.columns:
            if column not in ROW_KEYS and (near := _near(column, ROW_KEYS)):
                strange[f'the column "{column}"{near}'].append(row.source)
    for what, sources in sorted(strange.items()):
        rows = list(dict.fromkeys(sources))
        yield Note(
            "unknown-keys", "warn", f"{wording.rows(rows)} with {what}, which is not read", "rename or remove it", rows
        )


def _near(key: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(key.lower(), list(known), n=1, cutoff=ALIKE)
    return f' (did you mean "{found[0]}"?)' if found else ""


def empty_input(material: Material) -> Iterator[Note]:
    """A row that asks nothing."""
    sources = [row.source for row in material.rows if _asks_nothing(row)]
    if sources:
        reason = f"{wording.rows(sources)} ask nothing: there is no text before the answer"
        yield Note("empty-input", "warn", reason, "give them a question, or use format text", sources)


def _asks_nothing(row: Example) -> bool:
    if row.kind == "completion":
        return not (row.prompt or "").strip()
    return row.kind == "chat" and not any((m.get("content") or "").strip() for m in row.messages[:-1])


def tool_mismatch(material: Material) -> Iterator[Note]:
    """Calls to functions that are not declared or with arguments they don't take; replies to no call."""
    wrong: dict[str, list[Source]] = defaultdict(list)
    undeclared: list[Source] = []
    for row in material.rows:
        messages = row.messages + row.chosen + row.rejected
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        if calls and not row.tools:
            undeclared.append(row.source)
        for fault in {*_call_faults(calls, row), *_reply_faults(messages)}:
            wrong[fault].append(row.source)
    for fault, sources in sorted(wrong.items()):
        remedy = "mend the call, or declare the function as it is called"
        yield Note("tool-mismatch", "block", f"{wording.rows(sources)} with {fault}", remedy, sources, remove=sources)
    if undeclared:
        reason = f"{wording.rows(undeclared)} call functions but declare no tools, so the prompt won't show them"
        yield Note("tools-missing", "warn", reason, 'add the column "tools"', undeclared)


def _call_faults(calls: list[dict[str, Any]], row: Example) -> Iterator[str]:
    declared = {tool["function"]["name"]: tool["function"].get("parameters") for tool in row.tools}
    for call in calls:
        name = call["function"]["name"]
        try:
            arguments = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            yield f"arguments for {name} that are not JSON"
            continue
        if not isinstance(arguments, dict):
            yield f"arguments for {name} that are not a JSON object"
        elif declared and name not in declared:
            yield f"a call to {name}, which its tools do not declare"
        elif declared and (fault := _parameter_fault(arguments, declared[name])):
            yield f"arguments for {name} that its parameters do not allow: {fault}"


def _parameter_fault(arguments: dict[str, Any], parameters: Any) -> str | None:
    """None also where the parameters are no JSON Schema: then nothing can be said."""
    try:
        return _compiled(json.dumps(parameters or {}, sort_keys=True)).fault(arguments)
    except ValueError:
        return None


@lru_cache(maxsize=1000)
def _compiled(parameters: str) -> Schema:
    return Schema(json.loads(parameters))


def _reply_faults(messages: tuple[Message, ...]) -> Iterator[str]:
    known: set[str] = set()
    for message in messages:
        known |= {call["id"] for call in message.get("tool_calls") or () if isinstance(call.get("id"), str)}
        replied = message.get("tool_call_id")
        if message["role"] == "tool" and replied and replied not in known:
            yield "a tool turn that replies to no call before it"
