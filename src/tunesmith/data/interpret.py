"""What a row's columns mean: every supported format, brought to one `Example`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, cast

from tunesmith.data.parts import said
from tunesmith.data.rows import Row, RowError
from tunesmith.data.turns import from_json, has_answer, read_tools, read_turns, require_answer
from tunesmith.types import Example, Message, Source

Format = Literal["messages", "prompt_completion", "input_output", "preference", "text"]

# A row has a format when it has all the columns of one of these, tried in order.
COLUMNS: dict[Format, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "preference": (("chosen", "rejected"), ("input", "preferred_output", "non_preferred_output")),
    "prompt_completion": (("prompt", "completion"),),
    "input_output": (("input", "output"),),
    "text": (("text",),),
}
# Columns that OpenAI's rows carry and that say nothing about the example itself.
OPENAI_OPTIONS = frozenset({"parallel_tool_calls", "tool_choice", "response_format"})


def detect(fields: Mapping[str, Any]) -> tuple[Format, str] | None:
    """The format a row has, and the columns that show it: `("input_output", '"input" and "output"')`."""
    for format, alternatives in COLUMNS.items():
        for columns in alternatives:
            if _has(fields, columns):
                return format, " and ".join(f'"{column}"' for column in columns)
    return None


def is_format(fields: Mapping[str, Any], format: Format) -> bool:
    """Whether a row has the columns of a format."""
    return any(_has(fields, columns) for columns in COLUMNS[format])


def _share(names: set[str], columns: tuple[str, ...]) -> float:
    """How much of a format's columns there is."""
    return len(names & set(columns)) / len(columns)


def _has(fields: Mapping[str, Any], columns: tuple[str, ...]) -> bool:
    return all(fields.get(column) is not None for column in columns)


def to_example(row: Row, format: Format, system: str | None = None) -> Example:
    """Interpret a row; `system` is put before chat turns that have no system turn. Raises RowError."""
    if not is_format(row.fields, format):
        _refuse_missing(row, format)
    match format:
        case "messages":
            return _from_messages(row, system)
        case "input_output":
            return _from_input_output(row, system)
        case "prompt_completion":
            return _from_prompt_completion(row, system)
        case "preference":
            return _from_preference(row, system)
        case "text":
            return _from_text(row)


def lacks_answer(fields: Mapping[str, Any]) -> bool:
    """Whether a row asks something and leaves the answer out: `input` alone, or `messages` ending in a user turn."""
    turns = fields.get("messages")
    if turns is None:
        return fields.get("input") is not None and fields.get("output") is None
    return isinstance(turns, list) and bool(turns) and isinstance(turns[-1], dict) and turns[-1].get("role") == "user"


def to_input(row: Row, system: str | None = None) -> Example:
    """Interpret a row that leaves the answer to a teacher. Raises RowError."""
    if row.fields.get("messages") is not None:
        messages = read_turns(row.fields["messages"], row.source)
        tools = read_tools(row.fields.get("tools"), row.source)
    else:
        asked: Message = {"role": "user", "content": _as_text(row.fields["input"])}
        messages, tools = (asked,), ()
    if not (messages[-1].get("content") or "").strip():
        raise RowError("the row asks nothing; give it a question, or remove it", rule="empty-input", source=row.source)
    used = {"messages", "tools", "input", "output"}
    return _example(row, "input", used, messages=_with_system(messages, system), tools=tools)


def _from_messages(row: Row, system: str | None) -> Example:
    messages = read_turns(row.fields["messages"], row.source)
    require_answer(messages, row.source)
    tools = read_tools(row.fields.get("tools"), row.source)
    return _example(row, "chat", {"messages", "tools"}, messages=_with_system(messages, system), tools=tools)


def _from_input_output(row: Row, system: str | None) -> Example:
    answer = _as_text(row.fields["output"])
    turns: tuple[Message, ...] = (
        {"role": "user", "content": _as_text(row.fields["input"])},
        {"role": "assistant", "content": answer},
    )
    require_answer(turns, row.source)
    return _example(row, "chat", {"input", "output"}, messages=_with_system(turns, system))


def _from_prompt_completion(row: Row, system: str | None) -> Example:
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    used = {"prompt", "completion"}
    if isinstance(completion, list) or isinstance(prompt, list):
        asked = read_turns(prompt, row.source, "prompt") if prompt else ()
        answer = read_turns(completion, row.source, "completion")
        require_answer(answer, row.source)
        # Only the completion is trained on, so what the assistant says in the prompt is switched off.
        asked = tuple(cast(Message, {**turn, "weight": 0}) if turn["role"] == "assistant" else turn for turn in asked)
        tools = read_tools(row.fields.get("tools"), row.source)
        return _example(row, "chat", {*used, "tools"}, messages=_with_system(asked + answer, system), tools=tools)
    text = _as_text(completion)
    if not text.strip():
        raise RowError("the completion is empty; give the row an answer", rule="empty-answer", source=row.source)
    return _example(row, "completion", used, prompt=_as_text(prompt), completion=text)


def _from_text(row: Row) -> Example:
    text = _as_text(row.fields["text"])
    if not text.strip():
        raise RowError("the text is empty; remove the row", rule="empty-answer", source=row.source)
    return _example(row, "text", {"text"}, text=text)


def _from_preference(row: Row, system: str | None) -> Example:
    """`prompt`, `chosen`, `rejected` as strings or turns, or OpenAI's spelling of the same."""
    fields, tools = row.fields, row.fields.get("tools")
    if "preferred_output" in fields and "chosen" not in fields:
        asked = from_json(fields["input"], row.source, "input") if isinstance(fields["input"], str) else fields["input"]
        if isinstance(asked, dict):
            tools, asked = asked.get("tools"), asked.get("messages")
        prompt, chosen, rejected = asked, fields["preferred_output"], fields["non_preferred_output"]
        used = {"input", "preferred_output", "non_preferred_output", "tools"}
    else:
        prompt, chosen, rejected = fields.get("prompt"), fields["chosen"], fields["rejected"]
        used = {"prompt", "chosen", "rejected", "tools"}
    shared = _turns(prompt, "user", row.source, "prompt") if prompt is not None else ()
    answers = [
        _turns(value, "assistant", row.source, name) for name, value in (("chosen", chosen), ("rejected", rejected))
    ]
    shared, answers = _without_shared_start(shared, answers)
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer or answer[-1]["role"] != "assistant" or not has_answer(answer[-1]):
            raise RowError(
                f'"{name}" must end with an assistant turn that says something', rule="empty-answer", source=row.source
            )
    if not shared:
        raise RowError('there is no prompt; give the row a "prompt"', rule="no-answer", source=row.source)
    if [said(turn).strip() for turn in answers[0]] == [said(turn).strip() for turn in answers[1]]:
        raise RowError(
            '"chosen" and "rejected" are the same answer, so there is nothing to prefer; mend one, or remove the row',
            rule="equal-answers",
            source=row.source,
        )
    return _example(
        row,
        "preference",
        used,
        messages=_with_system(shared, system),
        tools=read_tools(tools, row.source),
        chosen=answers[0],
        rejected=answers[1],
    )


def _without_shared_start(
    shared: tuple[Message, ...], answers: list[tuple[Message, ...]]
) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """Some data sets repeat the prompt inside `chosen` and `rejected`; move it to the prompt."""
    start = 0
    chosen, rejected = answers
    while start < min(len(chosen), len(rejected)) - 1 and chosen[start] == rejected[start]:
        start += 1
    repeated = chosen[:start]
    if repeated and (not shared or repeated[-len(shared) :] == shared):
        return repeated, [chosen[start:], rejected[start:]]
    return shared, answers


def _turns(value: Any, role: Literal["user", "assistant"], source: Source, column: str) -> tuple[Message, ...]:
    """A string as one turn of this role, or a list of turns."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return read_turns(value, source, column)


def _as_text(value: Any) -> str:
    """Text as it is; labels and structures as JSON: `_as_text({"a": 1}) == '{"a": 1}'`."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    if not system or any(message["role"] in ("system", "developer") for message in messages):
        return messages
    return ({"role": "system", "content": system}, *messages)


def _example(
    row: Row, kind: Literal["chat", "completion", "text", "preference", "input"], used: set[str], **parts: Any
) -> Example:
    columns = {key: value for key, value in row.fields.items() if key not in used}
    try:
        content = json.dumps([kind, parts, columns], ensure_ascii=False, sort_keys=True, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            "the row holds half of a surrogate pair (a \\ud… escape without its partner); mend the escape",
            rule="bad-encoding",
            source=row.source,
        ) from None
    return Example(hashlib.sha256(content).hexdigest()[:16], row.source, kind, columns=columns, **parts)


def _refuse_missing(row: Row, format: Format) -> NoReturn:
    """Say which column of the format a row lacks."""
    best = max(COLUMNS[format], key=lambda columns: sum(row.fields.get(column) is not None for column in columns))
    lacking = [column for column in best if row.fields.get(column) is None]
    names = " and ".join(f'"{column}"' for column in lacking)
    found = ", ".join(f'"{name}"' for name in list(row.fields)[:8]) or "none"
    raise RowError(
        f"the row has no {names}, which format {format} needs (its columns: {found}); add it, or remove the row",
        rule="no-answer",
        source=row.source,
    )


def refuse_unknown(row: Row) -> NoReturn:
    """Say why a row has no format that is known, and what to do."""
    names = set(row.fields)
    found = ", ".join(f'"{name}"' for name in list(row.fields)[:8]) or "none"
    if "conversations" in names:
        remedy = (
            'ShareGPT rows are not read; rename "conversations" to "messages", "from" to "role", "value" to "content"'
        )
    elif "instruction" in names:
        remedy = ALPACA
    else:
        nearest = max(COLUMNS, key=lambda format: max(_share(names, columns) for columns in COLUMNS[format]))
        share = max(_share(names, columns) for columns in COLUMNS[nearest])
        if share:
            _refuse_missing(row, nearest)
        wanted = "; ".join(" and ".join(f'"{c}"' for c in columns) for way in COLUMNS.values() for columns in way)
        remedy = f"rename them to one of: {wanted}"
    raise RowError(f"no known format has the columns {found}; {remedy}", rule="unknown-format", source=row.source)


ALPACA = 'Alpaca rows are not read; join "instruction" and "input" into "input"'


def refuse_alpaca(row: Row) -> NoReturn:
    """Reading only "input" and "output" of an Alpaca row would lose the instruction without a word."""
    raise RowError(
        f"{ALPACA}, or set data.format: input_output to leave the instruction out",
        rule="unknown-format",
        source=row.source,
    )
