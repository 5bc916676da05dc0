"""Does anything held out, or nearly the same, stand among the rows trained on?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Literal

import numpy as np

from tunesmith.data import wording
from tunesmith.data.likeness import normalise
from tunesmith.data.material import Material, Note
from tunesmith.data.minhash import Labels
from tunesmith.data.parts import front
from tunesmith.data.private import quote

MOST_FRONTS = 20  # the commonest; where every row has its own there are no examples for all
SHORTEST_SHOWN = 8  # characters of an input; less is found in any prompt by chance
NEAR_REMEDY = "remove them from the training file (--fix does), or let tunesmith hold rows out itself"


def duplicates(material: Material) -> Iterator[Note]:
    """Rows that repeat another row of their own side, input and answer, and what a random split would leak."""
    first: dict[tuple[int, str], int] = {}
    copies: list[int] = []
    for number, (same, answer) in enumerate(zip(material.same.tolist(), material.answers, strict=True)):
        side = number >= len(material.train)
        if first.setdefault((2 * same + side, normalise(answer)), number) != number:
            copies.append(number)
    if not copies:
        return
    sources = material.sources(copies)
    leak = random_split_leak(material.same, _fraction(material))
    repeat = "repeats" if len(sources) == 1 else "repeat"
    reason = (
        f"{wording.rows(sources)} of {len(material.rows):,} {repeat} an earlier one ({len(first):,} are distinct); "
        f"a random split would leak {leak:.0%} of its held-out rows into training"
        f"{'' if isinstance(material.data.held_out, str) else ', this one keeps copies together'}"
    )
    remedy = "remove the copies (--fix does), or say by a weight that they should count more"
    yield Note("duplicates", "warn", reason, remedy, sources, remove=sources)


def near_duplicates(material: Material) -> Iterator[Note]:
    """Rows of one side whose inputs differ in a few words."""
    clusters = [numbers for numbers in _clusters(material.near) if len(set(material.same[numbers].tolist())) > 1]
    if not clusters:
        return
    clusters.sort(key=len, reverse=True)
    sources = material.sources(sorted(number for numbers in clusters for number in numbers))
    a, b = _two_that_differ(material, clusters[0])
    leak = random_split_leak(material.near, _fraction(material))
    reason = (
        f"{wording.rows(sources)} in {len(clusters):,} near-duplicate clusters, such as {quote(material.inputs[a])} "
        f"and {quote(material.inputs[b])}; a random split would leak {leak:.0%} of its held-out rows"
    )
    yield Note("near-duplicates", "warn", reason, "keep one of each, or more varied rows", sources)


def split_leak(material: Material) -> Iterator[Note]:
    """Held-out inputs that are trained on, word for word or nearly."""
    same, count = material.same.tolist(), len(material.train)
    train, held_out = range(count), range(count, len(material.rows))
    known = {same[n] for n in held_out}
    exact = [n for n in train if same[n] in known]
    if exact:
        trained = {same[n] for n in exact}
        copied = sum(same[n] in trained for n in held_out)
        reason = f"{copied:,} of {len(held_out):,} held-out rows have their input among the training rows too"
        sources = material.sources(exact)
        yield Note("split-leak", "block", reason, NEAR_REMEDY, sources, remove=sources)
    yield from _near_leaks(material, [n for n in train if same[n] not in known], held_out)


def _near_leaks(material: Material, train: list[int], held_out: range) -> Iterator[Note]:
    """Blocking where the answer is the same too; where it differs (filled-in templates), it is still to be found."""
    near_to = material.near.tolist()
    clusters: dict[int, dict[str, int]] = defaultdict(dict)
    for n in held_out:
        clusters[near_to[n]].setdefault(normalise(material.answers[n]), n)
    twins: list[tuple[int, int]] = []
    cousins: list[tuple[int, int]] = []
    for n in train:
        if answers := clusters.get(near_to[n]):
            twin = answers.get(normalise(material.answers[n]))
            (cousins if twin is None else twins).append((n, next(iter(answers.values())) if twin is None else twin))
    kinds: tuple[tuple[Literal["block", "warn"], list[tuple[int, int]], str], ...] = (
        ("block", twins, "with the same answer"),
        ("warn", cousins, "with another answer"),
    )
    for severity, pairs, what in kinds:
        if pairs:
            a, b = pairs[0]
            sources = material.sources([n for n, _ in pairs])
            reason = (
                f"{wording.rows(pairs)} trained on nearly equal a held-out row, {what}: {quote(material.inputs[a])} "
                f"and, held out at {material.rows[b].source}, {quote(material.inputs[b])}"
            )
            remove = sources if severity == "block" else ()
            yield Note("near-leak", severity, reason, NEAR_REMEDY, sources, remove=remove)


def group_leak(material: Material) -> Iterator[Note]:
    """A group with rows on both sides."""
    column = material.data.group_by
    if column is None:
        return
    held_out = {str(row.columns.get(column)) for row in material.held_out if row.columns.get(column) is not None}
    sources = [row.source for row in material.train if str(row.columns.get(column)) in held_out]
    if sources:
        reason = f'{wording.rows(sources)} trained on belong to a "{column}" that is also held out'
        yield Note("group-leak", "block", reason, NEAR_REMEDY, sources, remove=sources)


def few_shot_leak(material: Material) -> Iterator[Note]:
    """Held-out rows among the worked examples that many rows carry, in a system prompt or as earlier turns."""
    common = Counter(front(row) for row in material.rows).most_common(MOST_FRONTS)
    fronts = [text for text, count in common if count > 1 and text]
    first = len(material.train)
    pairs = zip(material.inputs[first:], material.answers[first:], strict=True)
    leaked = [
        number
        for number, (asked, answer) in enumerate(pairs, start=first)
        if answer and len(asked) >= SHORTEST_SHOWN and any(asked in text and answer in text for text in fronts)
    ]
    if leaked:
        sources = material.sources(leaked)
        stand = "stands" if len(leaked) == 1 else "stand"
        reason = f"{wording.rows(sources)} held out {stand} with the answer among the examples in front of other rows"
        yield Note("few-shot-leak", "block", reason, "take worked examples from the training rows", sources)


def random_split_leak(clusters: Labels, fraction: float) -> float:
    """Expected share of held-out rows with a row of their cluster in training, were each row drawn by chance.

    A held-out row of a cluster of m keeps all m - 1 others out of training with probability fraction^(m - 1).
    """
    sizes = np.unique(clusters, return_counts=True)[1]
    return float((sizes * (1 - fraction ** (sizes - 1.0))).sum() / max(1, sizes.sum()))


def _fraction(material: Material) -> float:
    held_out = material.data.held_out
    return held_out if isinstance(held_out, float) and held_out > 0 else 0.15


def _clusters(labels: Labels) -> list[list[int]]:
    """Row numbers by cluster, of clusters with more than one row."""
    found: dict[int, list[int]] = defaultdict(list)
    for number, label in enumerate(labels.tolist()):
        found[label].append(number)
    return [members for members in found.values() if len(members) > 1]


def _two_that_differ(material: Material, numbers: list[int]) -> tuple[int, int]:
    first = numbers[0]
    return first, next(n for n in numbers if material.same[n] != material.same[first])
