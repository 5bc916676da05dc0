"""Reading JSON out of an answer, strictly where it counts and forgivingly where a program would be."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

_FENCE = re.compile(r"```(?:json|JSON)?\s*\n(.*?)```", re.DOTALL)


class InvalidJson(ValueError):
    """The text is no JSON value, or one with NaN or Infinity."""


def parse_json(text: str) -> Any:
    """The text as one JSON value by RFC 8259, read as a program reads it: of a repeated key the last value counts.

    Raises InvalidJson, for NaN and Infinity too.
    """
    try:
        return json.loads(text.strip(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidJson(str(error)) from None


def find_json(text: str) -> Any:
    """The JSON value in an answer, as a program reading it would find it: the whole text; else what stands between
    ``` fences; else the first object or array that parses. Raises InvalidJson where there is none.
    """
    try:
        return parse_json(text)
    except InvalidJson:
        pass
    fenced = _FENCE.search(text)
    if fenced:
        try:
            return parse_json(fenced.group(1))
        except InvalidJson:
            pass
    decoder = json.JSONDecoder(parse_constant=_refuse)
    for start in [match.start() for match in re.finditer(r"[{\[]", text)][:20]:
        try:
            return decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            continue
    raise InvalidJson("no JSON value in the answer")


def fields(value: Any) -> Counter[tuple[str, str]]:
    """Every leaf as (path, value), a multiset. List positions don't count: ["a", "b"] equals ["b", "a"] field by field.

    {"a": {"b": 1}, "c": ["x", "x"]}  ->  (".a.b", "1") once, (".c[]", '"x"') twice
    """
    found: Counter[tuple[str, str]] = Counter()
    _collect(value, "", found)
    return found


def same_value(a: Any, b: Any) -> bool:
    """Equal as JSON: key order and 1 against 1.0 don't matter, list order does, true is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    return _leaf(a) == _leaf(b)


def _collect(value: Any, path: str, found: Counter[tuple[str, str]]) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _collect(inner, f"{path}.{key}", found)
    elif isinstance(value, list) and value:
        for inner in value:
            _collect(inner, f"{path}[]", found)
    else:
        found[path, _leaf(value)] += 1


def _leaf(value: Any) -> str:
    """A leaf as text: strings with their outer blanks gone, 1 and 1.0 alike, true apart from 1."""
    if isinstance(value, str):
        return json.dumps(value.strip(), ensure_ascii=False)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
