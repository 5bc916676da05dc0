"""Scorers for answers that are JSON."""

from __future__ import annotations

from typing import Any

from tunesmith.errors import InputError
from tunesmith.prove.json_answers import InvalidJson, fields, find_json, parse_json, same_value
from tunesmith.prove.scorers import Scorer, expected_of
from tunesmith.types import Item


def json_valid() -> Scorer:
    """1 where the whole answer is one JSON value (RFC 8259): nothing around it, no NaN."""
    return Scorer("json_valid", "1 if the whole answer is valid JSON", _is_valid, needs_expected=False)


def json_schema(schema: dict[str, Any]) -> Scorer:
    """1 where the whole answer is valid JSON and satisfies the schema (jsonschema; no reference is fetched)."""
    validator = schema_validator(schema)

    def grade(output: str, item: Item) -> float:
        try:
            return float(validator.is_valid(parse_json(output)))
        except InvalidJson:
            return 0.0

    return Scorer("json_schema", "1 if the whole answer satisfies the JSON Schema", grade, needs_expected=False)


def json_exact() -> Scorer:
    """1 where the JSON in the answer equals the expected JSON: key order aside, 1 equal to 1.0."""

    def grade(output: str, item: Item) -> float:
        expected = parse_json(expected_of(item))  # raises outside the try: a row's fault is not the answer's
        try:
            return float(same_value(find_json(output), expected))
        except InvalidJson:
            return 0.0

    return Scorer("json_exact", "1 if the JSON in the answer equals the expected JSON, key order aside", grade)


def json_fields() -> Scorer:
    """Field F1 of one item: with leaves as (path, value) pairs, F1 = 2 · matched / (answered + expected).

    {"a": 1, "b": 2} against {"a": 1, "c": 3}: one of two and one of two match, F1 = 0.5. No JSON in the answer: 0.
    """

    def grade(output: str, item: Item) -> float:
        expected = fields(parse_json(expected_of(item)))
        try:
            answered = fields(find_json(output))
        except InvalidJson:
            return 0.0
        return 2 * (answered & expected).total() / (answered.total() + expected.total())

    return Scorer("json_fields", "field F1: 2 · fields right / (fields answered + fields expected)", grade)


def schema_validator(schema: dict[str, Any]) -> Any:
    """A jsonschema validator that never reaches for the network. Raises InputError where the schema is none."""
    import jsonschema
    import referencing
    from jsonschema.validators import validator_for

    validator = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"data.schema is not a valid JSON Schema: {error.message}; correct it") from None
    return validator(schema, registry=referencing.Registry())


def _is_valid(output: str, item: Item) -> float:
    try:
        parse_json(output)
    except InvalidJson:
        return 0.0
    return 1.0
