"""Memory that is given out and taken back in runs, and keeps its pages meanwhile.

The system makes a page when it is first touched, which takes longer than writing an answer's keys and values to it. So
what an answer leaves goes to the next one.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left

import torch
from torch import Tensor

from tunesmith.cpu.pages import untouched


class Region:
    """Room for so many numbers on the CPU; whoever asks for more than is left gets memory of their own."""

    def __init__(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._gaps: list[tuple[int, int]] = []  # first number, one past the last; ascending, with something between
        self._all: Tensor | None = None
        if device.type != "cpu" or not numbers:
            return
        try:
            self._pages, self._all = untouched(numbers, dtype, large=True)
        except OSError:  # then everybody gets memory of their own
            return
        self._gaps.append((0, numbers))

    def take(self, count: int) -> Tensor:
        """[count] numbers of any value, from the first gap that is wide enough: the one most likely touched before."""
        for i, (start, stop) in enumerate(self._gaps):
            if self._all is not None and stop - start >= count > 0:
                self._gaps[i : i + 1] = [(start + count, stop)] if stop - start > count else []
                return self._all[start : start + count]
        return torch.empty(count, dtype=self._dtype, device=self._device)

    def give_back(self, taken: Tensor) -> None:
        """What `take` gave; nobody may use it any more."""
        if not self._has(taken):
            return
        start = int(taken.storage_offset())
        stop = start + len(taken)
        place = bisect_left(self._gaps, (start, stop))
        if place < len(self._gaps) and self._gaps[place][0] == stop:
            stop = self._gaps.pop(place)[1]
        if place and self._gaps[place - 1][1] == start:
            place -= 1
            start = self._gaps.pop(place)[0]
        self._gaps.insert(place, (start, stop))

    def trim(self) -> None:
        """Give the pages of what is not taken back to the system."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for gap in self._gaps:
            first, last = (edge * self._dtype.itemsize for edge in gap)
            first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            if (length := (last - first) // mmap.PAGESIZE * mmap.PAGESIZE) > 0:
                self._pages.madvise(mmap.MADV_DONTNEED, first, length)

    def _has(self, taken: Tensor) -> bool:
        return self._all is not None and taken.untyped_storage().data_ptr() == self._all.untyped_storage().data_ptr()
