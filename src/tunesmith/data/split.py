"""Which rows train and which are held out: nothing near a held-out row is ever trained on."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.data.likeness import Likeness, likeness, uniform
from tunesmith.data.minhash import Labels
from tunesmith.data.parts import distinct, labels
from tunesmith.errors import InputError
from tunesmith.types import Example

TOLERANCE = 3.0  # standard deviations that the held-out part's size may differ from what was asked


@dataclass(frozen=True)
class Split:
    """Both sides in file order. `hash` is decided by which rows are on which side.

    `supplied`: the held-out rows came from a file of the user's own, so the two sides may overlap.
    `near` and `same` number clusters over `train + held_out` (see Likeness), for the gate.
    """

    train: list[Example]
    held_out: list[Example]
    hash: str
    supplied: bool
    near: Labels = field(repr=False)
    same: Labels = field(repr=False)


def split(examples: Sequence[Example], held_out: float | Sequence[Example], group_by: str | None = None) -> Split:
    """Hold out a fraction of the rows, or take the held-out rows as given. Raises InputError.

    Rows that are near-duplicates of one another, and rows of one group, stay on one side. A cluster's side is decided
    by its content alone: it is held out if a hash of it, in [0, 1), is below the fraction. So rows added to a data set
    leave the others where they are, and the size of the held-out part has a binomial spread. Where that goes beyond
    three standard deviations or twice the size asked, or would leave a side (or a side of a label) without any row,
    the clusters with the smallest hashes are taken up to the size asked.
    """
    if not isinstance(held_out, (int, float)):
        both = [*examples, *held_out]
        return _made(list(examples), list(held_out), likeness(both), supplied=True)
    rows = distinct(examples)
    like = likeness(rows)
    clusters, keys = _with_groups(rows, like, group_by) if group_by else (like.near, like.keys)
    out = _choose(_units(rows, clusters, keys), float(held_out))
    chosen = {rows[i].source for i in np.flatnonzero(np.isin(clusters, list(out)))}
    of_source = {row.source: i for i, row in enumerate(rows)}
    train = [example for example in examples if example.source not in chosen]
    held = [row for row in rows if row.source in chosen]
    order = np.array([of_source[example.source] for example in [*train, *held]], np.int64)
    return _made(train, held, Likeness(like.same[order], like.near[order], like.keys[order]), supplied=False)


def _made(train: list[Example], held_out: list[Example], like: Likeness, *, supplied: bool) -> Split:
    digest = hashlib.sha256()
    for side in (train, held_out):
        digest.update("\n".join(sorted(example.id for example in side)).encode() + b"\n\n")
    return Split(train, held_out, digest.hexdigest(), supplied, like.near, like.same)


@dataclass(frozen=True, slots=True)
class _Unit:
    """Rows that must stay together."""

    number: int
    key: float
    size: int
    label: str


def _units(rows: Sequence[Example], clusters: Labels, keys: np.ndarray) -> list[_Unit]:
    """One unit a cluster, with the label most of its rows have."""
    names = labels(rows) or [""] * len(rows)
    smallest: dict[int, float] = {}
    found: dict[int, Counter[str]] = {}
    for cluster, key, name in zip(clusters.tolist(), keys.tolist(), names, strict=True):
        smallest[cluster] = min(key, smallest.get(cluster, 1.0))
        found.setdefault(cluster, Counter())[name] += 1
    return [
        _Unit(number, smallest[number], counts.total(), min(counts, key=lambda name: (-counts[name], name)))
        for number, counts in found.items()
    ]


def _with_groups(rows: Sequence[Example], like: Likeness, column: str) -> tuple[Labels, np.ndarray]:
    """Clusters joined where they share a group; a group's name decides its side, so that it may grow."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(rows)
    numbers: dict[str, int] = {}
    keys = like.keys.copy()
    groups = np.empty(count, np.int64)
    for i, row in enumerate(rows):
        if column not in row.columns:
            known = ", ".join(f'"{name}"' for name in row.columns) or "none"
            raise InputError(
                f'the row has no column "{column}", which data.group_by names (its other columns: {known})',
                file=row.source.file,
                line=row.source.line,
            )
        name = f"{type(row.columns[column]).__name__} {row.columns[column]}"
        groups[i] = count + int(like.near.max(initial=0)) + 1 + numbers.setdefault(name, len(numbers))
        keys[i] = uniform(name)
    nodes = int(groups.max(initial=0)) + 1
    edges = coo_matrix((np.ones(count, np.int8), (like.near + count, groups)), shape=(nodes, nodes))
    _, joined = connected_components(edges, directed=False)
    return joined[groups].astype(np.int64), keys


def _choose(units: list[_Unit], fraction: float) -> set[int]:
    """The numbers of the units to hold out, label by label."""
    if fraction == 0 or len(units) < 2:
        return set()
    by_label: dict[str, list[_Unit]] = {}
    for unit in units:
        by_label.setdefault(unit.label, []).append(unit)
    out: set[int] = set()
    for same_label in by_label.values():
        out |= _choose_within(same_label, fraction)
    return out or {min(units, key=lambda unit: (unit.size, unit.key)).number}


def _choose_within(units: list[_Unit], fraction: float) -> set[int]:
    """Units below the fraction by their key; by rank where chance went too far. A unit too large to hold out trains."""
    total = sum(unit.size for unit in units)
    wanted = fraction * total
    largest = max(2 * wanted, min(unit.size for unit in units))
    able = sorted((unit for unit in units if unit.size <= largest), key=lambda unit: (unit.key, unit.number))
    able_to_leave = len(able) - (len(able) == len(units))  # one stays to train on
    spread = math.sqrt(fraction * (1 - fraction) * sum(unit.size**2 for unit in able))
    below = [unit for unit in able if unit.key < fraction]
    size = sum(unit.size for unit in below)
    enough = bool(below) or wanted < 1
    too_far = abs(size - wanted) > TOLERANCE * spread or size > max(2 * wanted, min(unit.size for unit in units))
    if len(below) <= able_to_leave and enough and not too_far:
        return {unit.number for unit in below}
    return {unit.number for unit in _by_rank(able[:able_to_leave], wanted)}


def _by_rank(units: list[_Unit], wanted: float) -> list[_Unit]:
    """The first units whose sizes come closest to `wanted` in sum, at least one where any is wanted."""
    sums = np.cumsum([unit.size for unit in units]) if units else np.zeros(0)
    if not len(sums) or wanted < 0.5:
        return []
    return units[: int(np.argmin(np.abs(sums - wanted))) + 1]
