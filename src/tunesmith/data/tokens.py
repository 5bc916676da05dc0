"""Token ids on disk: an Arrow file, mapped, which is kept in the cache under what it depends on and made only once.

A file's name is that key and the hash of its content, which is checked before it is used; so what is half written,
damaged or out of date has no name that would be found. Where the cache can't be written, the same file is laid aside
without a name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tunesmith.data.lazy import Lazy
from tunesmith.data.mapped import ArrowTable, ArrowWriter, cache_folder, map_file, nameless_file, needs_room
from tunesmith.types import TokenizedExample

MOST_BYTES = 20 * 2**30  # of all files in the cache; what was used longest ago goes first
ENDING, UNFINISHED = ".arrow", ".partial"
WHOLE = -1  # `lost` of a row that was not cut
HASHED_AT_ONCE = 2**20
ROW, LOST, IDS, TAUGHT = range(1, 5)  # the columns after the id


@dataclass(frozen=True, slots=True)
class Made:
    """One sequence of a row. `lost`: where the row was cut, how many earlier answers went; else WHOLE."""

    example: TokenizedExample
    row: int
    lost: int = WHOLE


class Tokens:
    """What a file holds: its `sequences`, each made when it is asked for; `rows` and `lost` as in Made. [sequences]"""

    def __init__(self, file: IO[bytes]) -> None:
        self._table = ArrowTable(map_file(file))
        self.rows, self.lost = self._table.column(ROW), self._table.column(LOST)
        self._lists = [
            [(each.offsets.to_numpy(), each.values.to_numpy()) for each in (columns[IDS], columns[TAUGHT])]
            for columns in self._table.batches
        ]
        self.sequences = Lazy(len(self._table), self._sequence)

    def _sequence(self, index: int) -> TokenizedExample:
        batch, row = self._table.place(index)
        ids, taught = (values[offsets[row] : offsets[row + 1]] for offsets, values in self._lists[batch])
        return TokenizedExample(self._table.batches[batch][0][row].as_py(), ids, taught.astype(np.float32))


def remembered(key: str | None, make: Callable[[], Iterable[Made]]) -> Tokens:
    """The sequences that `make` gives, or those it gave for this key before. None: it has no key, and isn't kept.

    Raises what `make` raises, and then keeps nothing; InputError where no disk has room.
    """
    try:
        folder = None if key is None else _folder()
    except OSError:  # a home that can't be written
        folder = None
    if key is None or folder is None:
        return _aside(make())
    found = _find(folder, key)
    if found is not None:
        return found
    try:
        return _kept(folder, key, make())
    except OSError:  # a full disk, or a cache that was taken away: perhaps there is room elsewhere
        return _aside(make())


def _folder() -> Path:
    folder = cache_folder() / "tokens"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _aside(made: Iterable[Made]) -> Tokens:
    with nameless_file() as file:
        with needs_room():
            _write(file, made)
        return Tokens(file)


def _find(folder: Path, key: str) -> Tokens | None:
    """What the cache holds, if it is whole; what is damaged is removed."""
    for path in folder.glob(f"{key}-*{ENDING}"):
        try:
            with path.open("rb") as file:
                if path.name == _name(key, file):
                    os.utime(path)  # used now
                    return Tokens(file)
            path.unlink(missing_ok=True)
        except OSError:  # taken away by another process, or not ours to read
            continue
    return None


def _kept(folder: Path, key: str, made: Iterable[Made]) -> Tokens:
    """Write beside, name it once it is whole, and map it. Raises OSError."""
    with _unfinished(folder) as (path, file):
        _write(file, made)
        file.flush()
        os.fsync(file.fileno())
        found = Tokens(file)
        with contextlib.suppress(FileNotFoundError):  # taken for a dead process's: it is mapped all the same
            path.rename(folder / _name(key, file))
    _evict(folder, MOST_BYTES)
    return found


@contextmanager
def _unfinished(folder: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A file to write, locked as long as its process lives: what a killed one left is known by that."""
    descriptor, name = tempfile.mkstemp(UNFINISHED, dir=folder)  # for this user alone
    with os.fdopen(descriptor, "w+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield Path(name), file
        finally:
            Path(name).unlink(missing_ok=True)


def _write(file: IO[bytes], made: Iterable[Made]) -> None:
    import pyarrow as pa

    ids, taught = pa.list_(pa.int32()), pa.list_(pa.uint8())
    columns = [("id", pa.string()), ("row", pa.int64()), ("lost", pa.int32()), ("ids", ids), ("taught", taught)]
    writer = ArrowWriter(file, pa.schema(columns))
    for each in made:
        example = each.example
        mask = _mask(example.weights)
        writer.add(5 * len(mask), example.example_id, each.row, each.lost, example.input_ids, mask)
    writer.close()


def _mask(weights: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    mask = weights != 0
    assert (weights[mask] == 1).all(), "a row's tokens are trained or not"
    return mask.astype(np.uint8)


def _name(key: str, file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while part := file.read(HASHED_AT_ONCE):
        digest.update(part)
    return f"{key}-{digest.hexdigest()}{ENDING}"


def _evict(folder: Path, most: int) -> None:
    """Remove what killed processes left unfinished, and the files used longest ago beyond `most` bytes."""
    for path in folder.glob(f"*{UNFINISHED}"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # OSError: it is being written, or gone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    with contextlib.suppress(OSError):
        files = [(path.stat(), path) for path in folder.glob(f"*{ENDING}")]
        total = sum(facts.st_size for facts, _ in files)
        for facts, path in sorted(files, key=lambda each: each[0].st_mtime)[:-1]:
            if total > most:
                path.unlink(missing_ok=True)
                total -= facts.st_size
