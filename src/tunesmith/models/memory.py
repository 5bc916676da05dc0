"""Memory: how much this process holds, and giving back to the system what is no longer used."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

M_ARENA_MAX = -8  # malloc.h


def resident_bytes() -> int:
    """What this process holds now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_bytes(device: torch.device) -> int:
    """The most it has held since `forget_peak`: on the device, or resident where that is the CPU (on other systems than
    Linux since it began)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from now on, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc_pid_clear_refs(5)


def share_one_heap() -> None:
    """Let threads that begin from now on have their memory from one heap: glibc gives every thread one of its own, and
    what one thread has freed the others can't have, which comes to hundreds of megabytes."""
    _ask_glibc("mallopt", M_ARENA_MAX, 1)


def release_memory() -> None:
    """Collect what is unreachable, then have glibc give back what it keeps for later."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give back the pages of holes in the heap, which large temporaries among small results leave."""
    _ask_glibc("malloc_trim", 0)


def _ask_glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc's, where it is what this process is linked against."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), function):
        getattr(libc, function)(*arguments)
