"""JSON Schemas: the one of `data.schema`, and those of tools' parameters. Nothing is ever fetched for a `$ref`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError
from tunesmith.recipe_file import read_text_file


class Schema:
    """A compiled JSON Schema. Raises ValueError where the document is not one."""

    def __init__(self, document: Any) -> None:
        import jsonschema
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable

        if not isinstance(document, dict):
            raise ValueError("a JSON Schema is an object")
        kind = validator_for(document, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(document)
        except jsonschema.SchemaError as error:
            raise ValueError(error.message) from None
        self.document: dict[str, Any] = document
        self._validator = kind(document, registry=Registry())
        self._unresolvable = Unresolvable

    def fault(self, value: Any) -> str | None:
        """Where and why a value is not valid, in a few words; None where it is. Raises ValueError for a bad `$ref`."""
        try:
            found = next(iter(self._validator.iter_errors(value)), None)
        except self._unresolvable as error:
            raise ValueError(f"its $ref cannot be resolved here ({error})") from None
        if found is None:
            return None
        place = "".join(f"/{part}" for part in found.absolute_path)
        return f"{place or 'the value'} breaks {found.validator!r}"


def load_schema(path: str) -> Schema:
    """Read the schema file of a recipe. Raises InputError."""
    text = read_text_file(Path(path), "schema")
    try:
        return Schema(json.loads(text))
    except (ValueError, RecursionError) as error:  # JSON and schema errors alike
        raise InputError(f"this is not a JSON Schema: {error}", file=path) from None
