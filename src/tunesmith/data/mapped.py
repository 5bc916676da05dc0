"""Files that are mapped instead of held in memory: the system drops their pages where it needs room.

What only this process needs lies in files without a name, which nobody else can open and which are gone with the
process, however it ends.
"""

from __future__ import annotations

import bisect
import itertools
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tunesmith.disk import FULL
from tunesmith.errors import InputError
from tunesmith.home import home

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS, BATCH_BYTES = 4_096, 8 * 2**20  # a batch of an Arrow file is closed at either
SMALL = 2**16  # bytes, for which no file is made


def cache_folder() -> Path:
    """`$TUNESMITH_HOME/cache`, made for this user alone. Raises OSError where it can't be."""
    folder = home() / "cache"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def roomiest_folder() -> Path:
    """Where nameless files go: the tool's cache or the system's temporary folder, whichever has more room."""
    folders = [Path(tempfile.gettempdir())]
    with suppress(OSError):  # a home that can't be written
        folders.append(cache_folder())
    return max((each for each in folders if os.access(each, os.W_OK)), key=free_bytes, default=folders[0])


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def nameless_file() -> IO[bytes]:
    return tempfile.TemporaryFile(dir=roomiest_folder())


@contextmanager
def needs_room() -> Iterator[None]:
    """A full disk is said in a sentence: raises InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise no_room() from None


def no_room() -> InputError:
    return InputError(
        f"the disk has no room to lay the data aside in {roomiest_folder()}; free some, name a folder with more in "
        "TMPDIR, or take a share of the file by train: [{path: …, weight: 0.1}]"
    )


def map_file(file: IO[bytes], *, write: bool = False) -> mmap.mmap:
    """All of a file, which may then be closed. Raises ValueError where it is empty."""
    file.flush()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)


def scratch(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros, in a nameless file unless it is small. Raises InputError where the disk has no room for it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= SMALL:
        return np.zeros(shape, dtype)
    with nameless_file() as file:
        with needs_room():
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)  # a hole that can't be filled later would kill the process
            else:
                file.truncate(size)
        return np.frombuffer(map_file(file, write=True), dtype).reshape(shape)


def mapped_array(file: IO[bytes], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """What was written to a file, as a flat array."""
    return np.frombuffer(map_file(file), dtype) if file.tell() else np.zeros(0, dtype)


class ArrowWriter:
    """Rows to an Arrow file, a batch at a time. Raises OSError where they can't be written."""

    def __init__(self, file: IO[bytes], schema: pa.Schema) -> None:
        import pyarrow as pa

        self._schema = schema
        self._writer = pa.ipc.new_file(file, schema)
        self._columns: list[list[Any]] = [[] for _ in schema]
        self._size = 0

    def add(self, size: int, *values: Any) -> None:
        """A row, its values in the order of the schema; `size` is about what it takes, in bytes."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self._size += size
        if self._size >= BATCH_BYTES or len(self._columns[0]) >= BATCH_ROWS:
            self._write()

    def close(self) -> None:
        self._write()
        self._writer.close()

    def _write(self) -> None:
        import pyarrow as pa

        if self._columns[0]:
            arrays = [pa.array(values, field.type) for values, field in zip(self._columns, self._schema, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._columns, self._size = [[] for _ in self._schema], 0


class ArrowTable:
    """A mapped Arrow file by rows. `batches[i]` are the columns of one batch. Raises ValueError where it is none."""

    def __init__(self, mapping: mmap.mmap) -> None:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.py_buffer(mapping))
        self.batches: list[list[Any]] = [reader.get_batch(i).columns for i in range(reader.num_record_batches)]
        self._starts = [0, *itertools.accumulate(len(columns[0]) for columns in self.batches)]

    def __len__(self) -> int:
        return self._starts[-1]

    def place(self, row: int) -> tuple[int, int]:
        """Which batch a row is in, and where in it."""
        batch = bisect.bisect_right(self._starts, row) - 1
        return batch, row - self._starts[batch]

    def column(self, number: int) -> npt.NDArray[Any]:
        """A column of numbers. [rows]"""
        parts = [columns[number].to_numpy() for columns in self.batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
