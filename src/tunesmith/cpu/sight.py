"""Which keys each row of an attention sees, and what follows for a kernel that goes through both in blocks."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
ROWS = 48  # of a block: a multiple of every processor's tile
PIECE = 256  # keys whose scores exist at a time
NEVER = ALWAYS = int(np.iinfo(np.int32).max)  # where a key begins that no row sees; where one ends that all may see


@dataclass(frozen=True, slots=True)
class Seen:
    """Row i sees key j when begins[j] <= order[i] < ends[j] and places[i] < reach[j]: every row at least one.

    A causal mask is begins = a key's own order, a token tree's ends where the key's subtree does, and a window's reach
    is that many places after the key's own.
    """

    order: Ints  # [rows]
    places: Ints  # [rows]
    begins: Ints  # [keys]
    ends: Ints  # [keys]
    reach: Ints  # [keys]


def reach_of(places: Ints, window: int | None) -> Ints:
    """Of keys at these places, for rows that see so many places back, themselves counted; None: all."""
    return np.full(len(places), ALWAYS) if window is None else places + window


class Sight:
    """The same as a kernel reads it: for every block of rows the runs of panels that some of it sees.

    `table` holds for each run its first key, how many keys it has and whether some of them are hidden from some rows;
    `starts` [blocks + 1] where a block's runs begin.
    """

    def __init__(self, seen: Seen, columns: int) -> None:
        """columns: keys of a panel."""
        self.rows, self.keys = len(seen.order), len(seen.begins)
        self.order, self.places = (np.ascontiguousarray(each, np.int32) for each in (seen.order, seen.places))
        missing = -self.keys % columns
        self.begins, self.ends, self.reach = (
            np.concatenate([each, np.full(missing, filler)]).astype(np.int32)
            for each, filler in ((seen.begins, NEVER), (seen.ends, 0), (seen.reach, 0))
        )
        self.table, self.starts = array("q"), array("q", [0])
        visible, whole = self._panels(columns)
        most = PIECE // columns
        for some, every in zip(visible, whole, strict=True):
            for first, stop in _runs(some, every, most):
                keys = min(stop * columns, self.keys) - first * columns
                self.table.extend((first * columns, keys, int(not every[first])))
            self.starts.append(len(self.table) // 3)

    def _panels(self, columns: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """[blocks, panels] whether some row of the block may see some key of the panel; whether each sees all."""
        starts = np.arange(0, self.rows, ROWS)
        ends_of = np.minimum, np.maximum
        least, most = ([f.reduceat(each, starts)[:, None] for each in (self.order, self.places)] for f in ends_of)
        begins, ends, reach = (each.reshape(-1, columns) for each in (self.begins, self.ends, self.reach))
        some = (begins.min(1) <= most[0]) & (ends.max(1) > least[0]) & (reach.max(1) > least[1])
        every = (begins.max(1) <= least[0]) & (ends.min(1) > most[0]) & (reach.min(1) > most[1])
        return some, every


def _runs(some: npt.NDArray[np.bool_], every: npt.NDArray[np.bool_], most: int) -> list[tuple[int, int]]:
    """[first, stop) of neighbouring panels that are seen, and are alike in being seen whole; of at most so many."""
    kind = some.astype(np.int8) + (some & every)
    edges = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)]
    return [
        (first, min(first + most, stop))
        for start, stop in pairwise(edges)
        if kind[start]
        for first in range(start, stop, most)
    ]
