"""Chat turns as people write them, checked and brought to one shape."""

from __future__ import annotations

import json
from typing import Any, cast

from tunesmith.data.rows import RowError
from tunesmith.types import Message, Source

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}


def read_turns(value: Any, source: Source, column: str = "messages") -> tuple[Message, ...]:
    """The turns in a column: a list of messages, or the same written as JSON text. Raises RowError."""
    if isinstance(value, str):
        value = from_json(value, source, column)
    if not isinstance(value, list) or not value:
        raise RowError(
            f'"{column}" must be a list with at least one message, such as {{"role": "user", "content": "…"}}',
            rule="bad-message",
            source=source,
        )
    return tuple(_message(turn, number, source) for number, turn in enumerate(value, start=1))


def read_tools(value: Any, source: Source) -> tuple[dict[str, Any], ...]:
    """The functions a row declares, in OpenAI's shape. Raises RowError."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = from_json(value, source, "tools")
    named = isinstance(value, list) and all(isinstance(tool, dict) and _function_name(tool) for tool in value)
    if not named:
        raise RowError(
            '"tools" must be a list of {"type": "function", "function": {"name": …, "parameters": …}}',
            rule="bad-tools",
            source=source,
        )
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def _function_name(tool: dict[str, Any]) -> str | None:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def has_answer(message: Message) -> bool:
    """Whether a turn says something: text that isn't blank, or a tool call."""
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def require_answer(messages: tuple[Message, ...], source: Source) -> None:
    """Raise RowError unless the last turn is an assistant's and says something."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(
            f'the last message has role "{last["role"]}"; a training row must end with "assistant"',
            rule="no-answer",
            source=source,
        )
    if not has_answer(last):
        raise RowError(
            "the last assistant message is empty; give it content or tool_calls", rule="empty-answer", source=source
        )


def from_json(text: str, source: Source, column: str) -> Any:
    """A cell that holds JSON, as CSV and some Parquet files keep lists. Raises RowError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f'"{column}" is text but not valid JSON', rule="broken-json", source=source) from None


def _message(turn: Any, number: int, source: Source) -> Message:
    if not isinstance(turn, dict):
        raise RowError(
            f'message {number} is not an object with "role" and "content"', rule="bad-message", source=source
        )
    message: dict[str, Any] = {key: value for key, value in turn.items() if value is not None or key == "content"}
    message["role"] = _role(turn, number, source)
    message["content"] = _content(turn.get("content"), number, source)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], number, source)
    if message.get("weight", 0) not in (0, 1):
        raise RowError(f"message {number} has a weight that is neither 0 nor 1", rule="bad-message", source=source)
    if "weight" in message:
        message["weight"] = int(message["weight"])
    if message["content"] is None and not message.get("tool_calls"):
        if message["role"] != "assistant":
            raise RowError(f"message {number} has no content", rule="bad-message", source=source)
        message["content"] = ""
    return cast(Message, message)


def _role(turn: dict[str, Any], number: int, source: Source) -> str:
    role = turn.get("role")
    if role in ROLES:
        return role
    if "role" not in turn and "from" in turn:
        why = f'message {number} has "from" and "value" (ShareGPT); rename them to "role" and "content"'
    elif role is None:
        why = f'message {number} has no "role"'
    else:
        near = OTHER_NAMES.get(str(role).lower()) or (str(role).lower() if str(role).lower() in ROLES else None)
        hint = f'did you mean "{near}"?' if near else f"known are {', '.join(ROLES)}"
        why = f'message {number} has the unknown role "{role}"; {hint}'
    raise RowError(why, rule="unknown-role", source=source)


def _content(value: Any, number: int, source: Source) -> str | None:
    """Text, or OpenAI's list of parts as long as all are text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    what = "parts that are not text" if isinstance(value, list) else "content that is not text"
    raise RowError(f"message {number} has {what}; only text can be trained on", rule="bad-message", source=source)


def _tool_calls(value: Any, number: int, source: Source) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape, with `arguments` as JSON text."""
    calls: list[dict[str, Any]] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                f'message {number} has a tool call without {{"function": {{"name": …, "arguments": …}}}}',
                rule="bad-tool-call",
                source=source,
            )
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
    return calls
