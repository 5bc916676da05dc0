"""Rows from JSONL: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from tunesmith.data.files import text_lines
from tunesmith.data.rows import Row, RowError
from tunesmith.types import Source


class _DuplicateKey(ValueError):
    """The same key stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _DuplicateKey(twice)
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value; write null")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def parse_object(text: str, source: Source) -> dict[str, Any] | RowError:
    """One JSON object, or what is wrong with it."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return json_fault(error, source)
    if isinstance(value, dict):
        return value
    kind = {list: "an array", str: "a string"}.get(type(value), "a single value")
    hint = "; a file that is one JSON array is named .json" if isinstance(value, list) else ""
    return RowError(
        f'the line holds {kind}, not an object such as {{"input": …}}{hint}', rule="broken-json", source=source
    )


def json_fault(error: Exception, source: Source) -> RowError:
    """A JSON error in the user's words."""
    if isinstance(error, _DuplicateKey):
        return RowError(f'the key "{error}" stands twice in one object; keep one', rule="duplicate-key", source=source)
    if isinstance(error, RecursionError):
        return RowError("the JSON is nested too deeply; flatten it", rule="broken-json", source=source)
    if isinstance(error, json.JSONDecodeError):
        what = error.msg[:1].lower() + error.msg[1:]
        message = f"not valid JSON: {what} at column {error.colno}; mend or remove the line"
        return RowError(message, rule="broken-json", source=source)
    return RowError(f"not valid JSON: {error}", rule="broken-json", source=source)


def jsonl_rows(path: str) -> Iterator[Row | RowError]:
    """One row a line; blank lines are passed over."""
    for line in text_lines(path):
        if isinstance(line, RowError):
            yield line
        elif line[1].strip():
            source = Source(path, line[0])
            found = parse_object(line[1], source)
            yield found if isinstance(found, RowError) else Row(found, source)
