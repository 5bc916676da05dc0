"""Memory that is no longer used goes back to the system."""

from __future__ import annotations

import ctypes
import gc


def release_memory() -> None:
    """Collect what is unreachable, then have glibc give back what it keeps for later."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give back the pages of holes in the heap, which large temporaries among small results leave."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
