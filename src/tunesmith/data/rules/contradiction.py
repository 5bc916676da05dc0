"""Is the same question answered in different ways, and how well could anyone then do?"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from tunesmith.data import wording
from tunesmith.data.material import Material, Note
from tunesmith.data.private import quote

LOWEST_CEILING = 0.8  # below it, where each input has one right answer, the data can't teach the task
PAIRS_SHOWN = 3


def contradiction(material: Material) -> Iterator[Note]:
    """Equal inputs with different answers; blocking where answers are labels or JSON and a fifth must be wrong."""
    groups = _contradicting(material, material.same.tolist())
    if not groups:
        return
    minority = _minority(material, groups)
    ceiling = 1 - len(minority) / len(material.rows)
    sources = material.sources(sorted(n for group in groups for n in group))
    reason = (
        f"{wording.rows(sources)} share {wording.count(len(groups), 'input')} but not the answer, so exact match can "
        f"reach {ceiling:.1%} at most: {_pairs(material, groups)}"
    )
    severity = "block" if ceiling < LOWEST_CEILING and _has_one_answer(material) else "warn"
    remedy = "keep the right answer (--fix keeps the most frequent), or add what tells the cases apart to the input"
    yield Note("contradiction", severity, reason, remedy, sources, remove=material.sources(minority))


def near_contradiction(material: Material) -> Iterator[Note]:
    """Nearly equal inputs with different labels."""
    if material.labels is None:
        return
    groups = [
        g for g in _contradicting(material, material.near.tolist()) if len({int(material.same[n]) for n in g}) > 1
    ]
    if groups:
        sources = material.sources(sorted(n for group in groups for n in group))
        reason = f"{wording.rows(sources)} have nearly the same input but another label: {_pairs(material, groups)}"
        yield Note("near-contradiction", "warn", reason, "look at these pairs and mend the wrong label", sources)


def _contradicting(material: Material, clusters: Iterable[int]) -> list[list[int]]:
    """Row numbers of each cluster in which the answers differ."""
    found: dict[int, list[int]] = defaultdict(list)
    for number, cluster in enumerate(clusters):
        if material.rows[number].kind in ("chat", "completion"):
            found[cluster].append(number)
    return [group for group in found.values() if len(group) > 1 and len({_answer(material, n) for n in group}) > 1]


def _minority(material: Material, groups: list[list[int]]) -> list[int]:
    """The rows that don't have their group's most frequent answer (the first such, where several are)."""
    rows: list[int] = []
    for group in groups:
        usual = Counter(_answer(material, n) for n in group).most_common(1)[0][0]
        rows.extend(n for n in group if _answer(material, n) != usual)
    return sorted(rows)


def _answer(material: Material, number: int) -> str:
    return " ".join(material.answers[number].split())


def _pairs(material: Material, groups: list[list[int]]) -> str:
    """`"Is it open?" is answered "yes" (line 3) and "no" (line 8)`, a few of them."""
    shown = []
    for group in groups[:PAIRS_SHOWN]:
        first = group[0]
        other = next(n for n in group if _answer(material, n) != _answer(material, first))
        lines = [material.rows[n].source.line for n in (first, other)]
        shown.append(
            f"{quote(material.inputs[first])} is answered {quote(material.answers[first])} (line {lines[0]}) and "
            f"{quote(material.answers[other])} (line {lines[1]})"
        )
    return "; ".join(shown)


def _has_one_answer(material: Material) -> bool:
    """Whether the task is one where an input has one right answer: labels, or JSON objects."""
    return material.labels is not None or all(_is_object(answer) for answer in material.answers)


def _is_object(answer: str) -> bool:
    if not answer.startswith("{"):
        return False
    try:
        return isinstance(json.loads(answer), dict)
    except (ValueError, RecursionError):
        return False
