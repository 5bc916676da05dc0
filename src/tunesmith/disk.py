"""Writing so that a kill or a power cut leaves the old or the new, never half of it, and a full disk is an OSError."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def _known(*names: str) -> frozenset[int]:
    """The numbers of errors, of those that this system has."""
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


FULL = _known("ENOSPC", "EDQUOT", "EFBIG")  # no room, over quota, over a limit
# What the system says where a place can't be written: full, read-only, forbidden, taken away.
REFUSALS = FULL | _known("EROFS", "EACCES", "EPERM", "EIO", "ENODEV", "ENXIO", "ESTALE")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all: beside, flushed, renamed."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """A folder with everything in it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """safetensors says what the system refused in words; raise it as the OSError it was."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None
