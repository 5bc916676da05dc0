"""Are JSON targets of one mind, and do they satisfy the recipe's schema?"""

from __future__ import annotations

import difflib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from tunesmith.data import wording
from tunesmith.data.material import Material, Note
from tunesmith.data.private import quote
from tunesmith.data.schema import load_schema
from tunesmith.errors import InputError

RARE = 0.05  # what at most this share of the targets does is drift, where nearly all others do the same
USUAL = 0.98  # a key that this share of the targets has is expected in all
ENOUGH = 20  # targets needed to speak of drift
ALIKE = 0.8  # difflib ratio from which a key is taken for another spelling of a usual one
NOT_JSON = object()


def schema_invalid(material: Material) -> Iterator[Note]:
    """A target that `data.schema` does not allow. Raises InputError where the schema itself is at fault."""
    path = material.data.schema_file
    if path is None:
        return
    schema = load_schema(path)
    wrong: dict[str, list[int]] = defaultdict(list)
    for number, answer in enumerate(material.answers):
        if material.rows[number].kind == "input":
            continue
        value = _parsed(answer)
        try:
            fault = "it is not JSON" if value is NOT_JSON else schema.fault(value)
        except ValueError as error:
            raise InputError(str(error), file=path) from None
        if fault:
            wrong[fault].append(number)
    for fault, numbers in sorted(wrong.items()):
        sources = material.sources(numbers)
        reason = f"{wording.rows(sources)} whose target data.schema does not allow: {fault}"
        yield Note("schema-invalid", "block", reason, "mend the target or the schema", sources, remove=sources)


def json_drift(material: Material) -> Iterator[Note]:
    """Targets that are JSON objects, but now and then with other keys, other types, or not JSON at all."""
    values = [_parsed(answer) for answer in material.answers]
    objects = {number: value for number, value in enumerate(values) if isinstance(value, dict)}
    if len(objects) < max(ENOUGH, (1 - RARE) * len(values)):
        return
    others = [number for number in range(len(values)) if number not in objects]
    if others:
        sources = material.sources(others)
        reason = (
            f"{wording.rows(sources)} whose target is not a JSON object, as all others are: "
            f"{quote(material.answers[others[0]])}"
        )
        yield Note("json-drift", "warn", reason, "write every target in one form", sources)
    yield from _key_drift(material, objects)
    yield from _type_drift(material, objects)


def _key_drift(material: Material, objects: dict[int, dict[str, Any]]) -> Iterator[Note]:
    """A usual key missing, or a rare key that looks like a misspelt usual one."""
    counts = Counter(key for value in objects.values() for key in value)
    for key, count in sorted(counts.items()):
        if USUAL * len(objects) <= count < len(objects):
            sources = material.sources([n for n, value in objects.items() if key not in value])
            reason = f'{wording.rows(sources)} whose target lacks the key "{key}", which all others have'
            yield Note("json-drift", "warn", reason, "add the key, or null where there is no value", sources)
        usual = [other for other in counts if counts[other] * RARE >= count]
        near = difflib.get_close_matches(_letters(key), [*map(_letters, usual)], n=1, cutoff=ALIKE)
        if near:
            meant = next(other for other in usual if _letters(other) == near[0])
            holders = [n for n, value in objects.items() if key in value]
            if any(meant in objects[n] for n in holders):  # both in one target: two keys, not two spellings
                continue
            sources = material.sources(holders)
            reason = f'{wording.rows(sources)} whose target has the key "{key}" where the others have "{meant}"'
            yield Note("json-drift", "warn", reason, "spell the key one way", sources)


def _letters(key: str) -> str:
    """`Zip_Code` and `zipcode` are one word."""
    return "".join(c for c in key.lower() if c.isalnum())


def _type_drift(material: Material, objects: dict[int, dict[str, Any]]) -> Iterator[Note]:
    """A key whose values are of one type but for a few."""
    kinds: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, value in objects.items():
        for key, inner in value.items():
            if inner is not None:
                kinds[key][_kind(inner)].append(number)
    for key, found in sorted(kinds.items()):
        total = sum(map(len, found.values()))
        usual = max(found, key=lambda kind: len(found[kind]))
        for kind, numbers in sorted(found.items()):
            if total >= ENOUGH and kind != usual and len(numbers) <= RARE * total:
                sources = material.sources(numbers)
                reason = f'{wording.rows(sources)} whose "{key}" is a {kind}, where the others have a {usual}'
                yield Note("json-drift", "warn", reason, "write the value in one type", sources)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, (int, float)):
        return "number"
    return {str: "string", list: "list", dict: "object"}[type(value)]


def _parsed(answer: str) -> Any:
    if not answer.startswith(("{", "[", '"')) and not answer[:1].isdigit() and answer not in ("true", "false", "null"):
        return NOT_JSON
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return NOT_JSON
