"""Which keys each row of an attention sees, and what follows for a kernel that goes through both in blocks."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
GRAIN = 12  # rows that are told apart: a multiple of every processor's tile
ROWS = 4 * GRAIN  # of a block
PANEL = 16  # keys that are told apart: whole vectors of every processor's
PIECE = 256  # keys whose scores exist at a time
FIELDS = 5  # integers that say what a run is
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

    `table` holds for each run its first key, how many keys it has, which of the block's rows see any of it (the first,
    and how many) and whether some of its keys are hidden from some of these; `starts` [blocks + 1] where a block's runs
    begin.
    """

    def __init__(self, seen: Seen) -> None:
        self.rows, self.keys = len(seen.order), len(seen.begins)
        self.order, self.places = (np.ascontiguousarray(each, np.int32) for each in (seen.order, seen.places))
        missing = -self.keys % PANEL
        self.begins, self.ends, self.reach = (
            np.concatenate([each, np.full(missing, filler)]).astype(np.int32)
            for each, filler in ((seen.begins, NEVER), (seen.ends, 0), (seen.reach, 0))
        )
        self.table, self.starts = array("q"), array("q", [0])
        first, stop, hides = self._panels()
        for block, each in enumerate(zip(first, stop, hides, strict=True)):
            rows = min(self.rows - block * ROWS, ROWS)
            for begin, end in _runs(*each):
                keys = min(end * PANEL, self.keys) - begin * PANEL
                row, last = each[0][begin] * GRAIN, min(each[1][begin] * GRAIN, rows)
                self.table.extend((begin * PANEL, keys, row, last - row, int(each[2][begin])))
            self.starts.append(len(self.table) // FIELDS)

    def _panels(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """[blocks, panels] the first of a block's grains that may see some of a panel's keys, one past the last, and
        whether one of these does not see all."""
        some, every = (_by_block(each) for each in self._grains())
        first = some.argmax(1)
        stop = np.where(some.any(1), some.shape[1] - some[:, ::-1].argmax(1), 0)
        return first, stop, every.sum(1) < stop - first

    def _grains(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """[grains, panels] whether some of the rows may see some key of the panel; whether each sees all."""
        starts = np.arange(0, self.rows, GRAIN)
        ends_of = np.minimum, np.maximum
        least, most = ([f.reduceat(each, starts)[:, None] for each in (self.order, self.places)] for f in ends_of)
        begins, ends, reach = (each.reshape(-1, PANEL) for each in (self.begins, self.ends, self.reach))
        some = (begins.min(1) <= most[0]) & (ends.max(1) > least[0]) & (reach.max(1) > least[1])
        every = (begins.max(1) <= least[0]) & (ends.min(1) > most[0]) & (reach.min(1) > most[1])
        return some, every


def _by_block(grains: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """[grains, panels] -> [blocks, grains of a block, panels], the last block filled up with what sees nothing."""
    missing = -len(grains) % (ROWS // GRAIN)
    return np.pad(grains, ((0, missing), (0, 0))).reshape(-1, ROWS // GRAIN, grains.shape[1])


def _runs(first: Ints, stop: Ints, hides: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[first, stop) of neighbouring panels that the same rows see, and are alike in being seen whole."""
    most = PIECE // PANEL
    alike = (np.diff(first) == 0) & (np.diff(stop) == 0) & (np.diff(hides) == 0)
    edges = [0, *(np.flatnonzero(~alike) + 1).tolist(), len(first)]
    return [
        (begin, min(begin + most, end))
        for start, end in pairwise(edges)
        if stop[start]
        for begin in range(start, end, most)
    ]
