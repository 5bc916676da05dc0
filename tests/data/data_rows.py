"""Rows and files for the tests of `data`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tunesmith.data.checks import check
from tunesmith.data.formats import read_examples
from tunesmith.data.report import DataReport
from tunesmith.data.split import split
from tunesmith.recipe import Data
from tunesmith.types import Example, Finding

CITIES = [
    "Oslo",
    "Lima",
    "Cairo",
    "Delhi",
    "Perth",
    "Quito",
    "Sofia",
    "Tunis",
    "Accra",
    "Hanoi",
    "Kyoto",
    "Milan",
    "Porto",
    "Turin",
    "Lyon",
    "Bern",
]
THINGS = [
    "kettle",
    "ladder",
    "violin",
    "saddle",
    "lantern",
    "compass",
    "anchor",
    "mirror",
    "basket",
    "hammer",
    "pillow",
    "bottle",
]
VERBS = [
    "repair",
    "paint",
    "borrow",
    "clean",
    "carry",
    "order",
    "return",
    "measure",
    "store",
    "replace",
    "wash",
    "polish",
]


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    """Rows as a JSONL file; a string is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def recipe_data(train: str, **keys: Any) -> Data:
    return Data.model_validate({"train": train, **keys})


def varied(count: int, answer: Callable[[int], str] = lambda i: f"Answer {i} about {CITIES[i % 16]}.") -> list[dict]:
    """Rows that all ask something else, in clean and varied words."""
    return [
        {
            "input": f"Please {VERBS[i % 12]} the {THINGS[i // 12 % 12]} near {CITIES[i * 7 % 16]} by {i} o'clock "
            f"and write about the {THINGS[i * 5 % 12]} of {CITIES[i // 3 % 16]}, then {VERBS[i // 5 % 12]} it {i * i}",
            "output": answer(i),
        }
        for i in range(count)
    ]


def chat(*turns: str, **keys: Any) -> dict[str, Any]:
    """Alternating user and assistant turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)], **keys}


def examples_of(tmp_path: Path, rows: Iterable[Any], **keys: Any) -> list[Example]:
    return [*read_examples(recipe_data(write_jsonl(tmp_path / "rows.jsonl", rows), **keys))]


def checked(tmp_path: Path, rows: Iterable[Any], held_out: Iterable[Any] | None = None, **keys: Any) -> DataReport:
    """The gate's report on rows written to rows.jsonl, and held-out rows written to held_out.jsonl."""
    options = {key: keys.pop(key) for key in ("renderer", "limit") if key in keys}
    train = examples_of(tmp_path, rows, **keys)
    data = recipe_data(str(tmp_path / "rows.jsonl"), **keys)
    if held_out is None:
        fraction = data.held_out
        assert isinstance(fraction, float | int)
        return check(split(train, fraction, data.group_by), data, **options)
    other = read_examples(recipe_data(write_jsonl(tmp_path / "held_out.jsonl", held_out)))
    return check(split(train, other, data.group_by), data, **options)


def found(report: DataReport, rule: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.rule == rule]


def lines_of(report: DataReport, rule: str) -> set[int]:
    return {line for finding in found(report, rule) for line in finding.lines}
