"""A schema for constrained decoding that doesn't fight the data's order of keys.

A grammar made from `properties` forces the schema's own order of keys (llguidance, and others). JSON objects have no
order, and training rows often list keys as they occur in a text. A model made to answer in an order it was not trained
on does worse for no reason, so such a schema's properties become patternProperties, which leave the order free. What
that gives up (`required`) the scorers still measure, against the schema as it was given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tunesmith.prove.json_answers import InvalidJson, parse_json

VALUES = ("enum", "const", "default", "examples")  # hold values, not schemas


def decoding_schema(schema: dict[str, Any], answers: Iterable[str]) -> dict[str, Any]:
    """The schema itself where every answer's keys come in its order, else the same with keys in any order."""
    parsed: list[Any] = []
    for answer in answers:
        try:
            parsed.append(parse_json(answer))
        except InvalidJson:
            continue
    return schema if all(_in_order(value, schema) for value in parsed) else _any_order(schema)


def _in_order(value: Any, schema: Any) -> bool:
    if not isinstance(schema, dict):
        return True
    if isinstance(value, list):
        return all(_in_order(each, schema.get("items")) for each in value)
    properties = schema.get("properties")
    if not isinstance(value, dict) or not isinstance(properties, dict):
        return True
    order = list(properties)
    places = [order.index(key) for key in value if key in properties]
    return places == sorted(places) and all(_in_order(each, properties.get(key)) for key, each in value.items())


def _any_order(schema: Any) -> Any:
    """properties {"a": A} -> patternProperties {"^a$": A}, at every depth; `required` goes, as it would come first."""
    if isinstance(schema, list):
        return [_any_order(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    free = {
        key: each if key in VALUES else _any_order(each)
        for key, each in schema.items()
        if key not in ("properties", "required")
    }
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {**free, "required": schema["required"]} if "required" in schema else free
    patterns = {f"^{re.escape(key)}$": _any_order(each) for key, each in properties.items()}
    return {**free, "patternProperties": {**patterns, **free.get("patternProperties", {})}}
