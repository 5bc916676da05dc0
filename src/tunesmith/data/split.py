"""Which rows train and which are held out: nothing near a held-out row is ever trained on."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.data.lazy import joined, picked
from tunesmith.data.likeness import CODES, Likeness, code, likeness, numbered
from tunesmith.data.minhash import Labels
from tunesmith.data.parts import labels
from tunesmith.errors import InputError
from tunesmith.types import Example

LINES = 2**40  # more than a file has
TOLERANCE = 3.0  # standard deviations that the held-out part's size may differ from what was asked


@dataclass(frozen=True)
class Split:
    """Both sides in file order. `hash` is decided by which rows are on which side.

    `supplied`: the held-out rows came from a file of the user's own, so the two sides may overlap.
    `near` and `same` number clusters over `train + held_out` (see Likeness), for the gate.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
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
    ids, of, first = identify(examples)
    if not isinstance(held_out, (int, float)):
        like = likeness(joined(examples, held_out))
        return _made(examples, held_out, (ids, identify(held_out)[0]), like, supplied=True)
    rows = picked(examples, first)
    like = likeness(rows)
    clusters, keys = _with_groups(rows, like, group_by) if group_by else (like.near, like.keys)
    chosen = np.isin(clusters, _choose(_units(rows, clusters, keys), float(held_out)))
    train, held = np.flatnonzero(~chosen[of]), np.flatnonzero(chosen)
    order = np.concatenate([of[train], held])
    like = Likeness(like.same[order], like.near[order], like.keys[order])
    sides = picked(examples, train), picked(rows, held)
    return _made(*sides, (ids[train], ids[first[held]]), like, supplied=False)


def identify(examples: Sequence[Example]) -> tuple[npt.NDArray[np.uint64], Labels, Labels]:
    """Ids and numbers of the sources, both [examples], and where each source is met first [sources].

    Copies that a file's weight made have one source.
    """
    ids, places, files = array("Q"), array("q"), dict[str, int]()
    for example in examples:
        ids.append(int(example.id, 16))
        places.append(files.setdefault(example.source.file, len(files)) * LINES + example.source.line)
    return np.frombuffer(ids, np.uint64), *numbered(np.frombuffer(places, np.int64))


def _made(
    train: Sequence[Example],
    held_out: Sequence[Example],
    ids: tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]],
    like: Likeness,
    *,
    supplied: bool,
) -> Split:
    digest = hashlib.sha256()
    for side in ids:
        for i, each in enumerate(np.sort(side)):
            digest.update(b"\n" * (i > 0) + f"{int(each):016x}".encode())
        digest.update(b"\n\n")
    return Split(train, held_out, digest.hexdigest(), supplied, like.near, like.same)


@dataclass(frozen=True, slots=True)
class _Units:
    """Rows that must stay together: their cluster's number, its smallest key, its rows, its label. All [units]"""

    numbers: Labels
    keys: npt.NDArray[np.float64]
    sizes: Labels
    labels: Labels

    def some(self, which: npt.NDArray[Any]) -> _Units:
        return _Units(self.numbers[which], self.keys[which], self.sizes[which], self.labels[which])


def _units(rows: Sequence[Example], clusters: Labels, keys: npt.NDArray[np.float64]) -> _Units:
    """One unit a cluster, with the label most of its rows have (the first by name, where several are)."""
    numbers, of, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    smallest = np.ones(len(numbers))
    np.minimum.at(smallest, of, keys)
    found = labels(rows)
    if found is None:
        return _Units(numbers, smallest, sizes, np.zeros(len(numbers), np.int64))
    place = {name: i for i, name in enumerate(sorted(set(found)))}
    label = np.fromiter((place[name] for name in found), np.int64, len(found))
    pairs, counts = np.unique(of * len(place) + label, return_counts=True)
    unit, label = np.divmod(pairs, len(place))
    order = np.lexsort((label, -counts, unit))
    _, best = np.unique(unit[order], return_index=True)
    return _Units(numbers, smallest, sizes, label[order][best])


def _with_groups(rows: Sequence[Example], like: Likeness, column: str) -> tuple[Labels, npt.NDArray[np.float64]]:
    """Clusters joined where they share a group; a group's name decides its side, so that it may grow."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    names = array("Q")
    for row in rows:
        if column not in row.columns:
            known = ", ".join(f'"{name}"' for name in row.columns) or "none"
            raise InputError(
                f'the row has no column "{column}", which data.group_by names (its other columns: {known})',
                file=row.source.file,
                line=row.source.line,
            )
        names.append(code(f"{type(row.columns[column]).__name__} {row.columns[column]}"))
    codes, count = np.frombuffer(names, np.uint64), int(like.near.max(initial=-1)) + 1
    groups = numbered(codes)[0] + count
    nodes = int(groups.max(initial=0)) + 1
    edges = coo_matrix((np.ones(len(groups), np.int8), (like.near, groups)), shape=(nodes, nodes))
    _, joint = connected_components(edges, directed=False)
    return joint[groups].astype(np.int64), codes / CODES


def _choose(units: _Units, fraction: float) -> Labels:
    """The numbers of the units to hold out, label by label."""
    if fraction == 0 or len(units.numbers) < 2:
        return np.zeros(0, np.int64)
    sides = [_choose_within(units.some(units.labels == label), fraction) for label in np.unique(units.labels)]
    out = np.concatenate(sides)
    return out if len(out) else units.numbers[np.lexsort((units.keys, units.sizes))[:1]]


def _choose_within(units: _Units, fraction: float) -> Labels:
    """Units below the fraction by their key; by rank where chance went too far. A unit too large to hold out trains."""
    wanted, smallest = fraction * int(units.sizes.sum()), int(units.sizes.min())
    largest = max(2 * wanted, smallest)
    able = units.some(units.sizes <= largest)
    able = able.some(np.lexsort((able.numbers, able.keys)))
    able_to_leave = len(able.numbers) - (len(able.numbers) == len(units.numbers))  # one stays to train on
    spread = math.sqrt(fraction * (1 - fraction) * int((able.sizes**2).sum()))
    below = able.some(able.keys < fraction)
    size = int(below.sizes.sum())
    enough = size > 0 or wanted < 1
    too_far = abs(size - wanted) > TOLERANCE * spread or size > largest
    if len(below.numbers) <= able_to_leave and enough and not too_far:
        return below.numbers
    return _by_rank(able.some(np.arange(able_to_leave)), wanted)


def _by_rank(units: _Units, wanted: float) -> Labels:
    """The first units whose sizes come closest to `wanted` in sum, at least one where any is wanted."""
    if not len(units.numbers) or wanted < 0.5:
        return np.zeros(0, np.int64)
    return units.numbers[: int(np.argmin(np.abs(np.cumsum(units.sizes) - wanted))) + 1]
