"""Which training rows to show as worked examples: one fixed set for all questions, or the most similar to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tunesmith.prove.json_answers import InvalidJson, fields, parse_json
from tunesmith.prove.retrieval import Index
from tunesmith.prove.task import Task, question
from tunesmith.prove.wordings import Shot
from tunesmith.types import Item

Shots = Callable[[Item], list[Shot]]
LONGEST = 2  # times the median: longer rows make poor examples in a small context


def fixed_shots(pool: Sequence[Item], k: int, task: Task) -> Shots:
    """`k` rows that together cover the most labels or JSON keys, short ones first; the same for every question.

    Greedy set cover, then the shortest of what is left; the block is a shared prefix, computed once by the engine.
    """
    rows = _not_too_long(pool)
    chosen: list[Item] = []
    covered: set[str] = set()
    while rows and len(chosen) < k:
        best = max(rows, key=lambda row: (len(_features(row, task) - covered), -_length(row)))
        if not _features(best, task) - covered:
            covered = set()  # all covered once: begin another round
            best = max(rows, key=lambda row: (len(_features(row, task)), -_length(row)))
        covered |= _features(best, task)
        chosen.append(best)
        rows = [row for row in rows if row is not best]
    shots = [_shot(row) for row in chosen]
    return lambda item: shots


def similar_shots(pool: Sequence[Item], k: int) -> Shots:
    """The `k` training rows most like the question by BM25, the most similar last, next to the question."""
    index = Index([question(row) for row in pool])
    place_of = {row.id: place for place, row in enumerate(pool)}

    def shots(item: Item) -> list[Shot]:
        nearest = index.nearest(question(item), k, without=place_of.get(item.id))
        return [_shot(pool[place]) for place in reversed(nearest)]

    return shots


def _shot(row: Item) -> Shot:
    return Shot(question(row), row.expected or "")


def _features(row: Item, task: Task) -> set[str]:
    """What an example shows: its label, or the JSON paths of its answer; for text, nothing but itself."""
    answer = row.expected or ""
    if task.kind == "label":
        return {answer.strip()}
    if task.kind == "json":
        try:
            return {path for path, _ in fields(parse_json(answer))}
        except InvalidJson:
            return set()
    return {row.id}


def _length(row: Item) -> int:
    return len(question(row)) + len(row.expected or "")


def _not_too_long(pool: Sequence[Item]) -> list[Item]:
    if not pool:
        return []
    limit = LONGEST * sorted(_length(row) for row in pool)[len(pool) // 2]
    return [row for row in pool if _length(row) <= limit]
