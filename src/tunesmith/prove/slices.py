"""Cutting the held-out rows into slices: where does the tuned model do worse than a prompt?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePath

from tunesmith.prove.json_answers import InvalidJson, fields, parse_json
from tunesmith.prove.task import Task, question
from tunesmith.types import Item

MOST_VALUES = 12  # a column with more distinct values than this is no slice
MOST_LABELS = 50
Slicer = Callable[[Item], str | None]


def slice_items(items: Sequence[Item], train: Sequence[Item], task: Task) -> dict[str, dict[str, str]]:
    """For each item's id the slices it is in: length, source, label, how frequent its answer's kind was in training,
    and every column of few values. A slice that holds all items says nothing and is left out.
    """
    slicers: dict[str, Slicer] = {"length": _by_length(items), "source": lambda item: PurePath(item.source.file).name}
    if task.kind == "label":
        if len(task.labels) <= MOST_LABELS:
            slicers["label"] = lambda item: None if item.expected is None else item.expected.strip()
        slicers["label in training"] = _by_frequency(train, lambda item: (item.expected or "").strip())
    if task.kind == "json":
        slicers["fields in training"] = _by_frequency(train, _shape)
    for column in sorted({name for item in items for name in item.columns}):
        slicers[column] = _by_column(column)
    found: dict[str, dict[str, str]] = {item.id: {} for item in items}
    for name, slicer in slicers.items():
        values = {item.id: slicer(item) for item in items}
        distinct = {value for value in values.values() if value is not None}
        most = MOST_LABELS if name == "label" else MOST_VALUES
        if 2 <= len(distinct) <= most:
            for item_id, value in values.items():
                if value is not None:
                    found[item_id][name] = value
    return found


def _by_length(items: Sequence[Item]) -> Slicer:
    """Thirds of the questions by characters."""
    lengths = sorted(len(question(item)) for item in items)
    if not lengths:
        return lambda item: None
    first, second = lengths[len(lengths) // 3], lengths[2 * len(lengths) // 3]

    def slicer(item: Item) -> str:
        length = len(question(item))
        return "short" if length < first else "medium" if length < second else "long"

    return slicer


def _by_frequency(train: Sequence[Item], kind: Callable[[Item], str]) -> Slicer:
    """rare: the answer's kind is in the less frequent half of the training rows, or new."""
    counts = Counter(kind(item) for item in train if item.expected is not None)
    covered, frequent = 0, set()
    for each, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        if covered >= counts.total() / 2:
            break
        frequent.add(each)
        covered += count

    def slicer(item: Item) -> str | None:
        if item.expected is None:
            return None
        each = kind(item)
        return "frequent" if each in frequent else "rare" if each in counts else "new"

    return slicer


def _shape(item: Item) -> str:
    """The set of JSON paths of an answer."""
    try:
        return " ".join(sorted({path for path, _ in fields(parse_json(item.expected or ""))}))
    except InvalidJson:
        return "not JSON"


def _by_column(column: str) -> Slicer:
    def slicer(item: Item) -> str | None:
        value = item.columns.get(column)
        return str(value)[:60] if isinstance(value, str | int | bool) else None

    return slicer
