"""Rows from tables: CSV, TSV and Parquet, streamed."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunesmith.data.files import MAX_ROW_BYTES, megabytes, open_data, text_lines, too_big
from tunesmith.data.rows import Row, RowError
from tunesmith.errors import InputError
from tunesmith.types import Source

PARQUET_BATCH = 256  # rows decoded at a time
MAX_UNPACKED_PARQUET = 4 * 2**30  # a .parquet.gz is unpacked to a temporary file of at most this


def csv_rows(path: str, delimiter: str = ",") -> Iterator[Row | RowError]:
    """Rows of a CSV file whose first line names the columns; `line` is where a row starts. Raises InputError."""
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _Lines(path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        start = lines.number + 1
        lines.size = 0
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise InputError(f"not valid CSV: {error}; mend the quotes of this row", file=path, line=start) from None
        if not cells:
            continue
        if names is None:
            names = _column_names(cells, path, start)
        elif len(cells) == len(names):
            yield Row(dict(zip(names, cells, strict=True)), Source(path, start))
        else:
            yield RowError(
                f"the row has {len(cells)} cells and the header {len(names)}; quote cells that hold a {delimiter!r}",
                rule="bad-table",
                source=Source(path, start),
            )


class _Lines:
    """The lines of a file as csv.reader wants them, counting; a row may not outgrow its limit over many lines."""

    def __init__(self, path: str) -> None:
        self._path, self._lines = path, text_lines(path)
        self.number, self.size = 0, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if isinstance(line, RowError):
            raise line  # the cells' quotes can't be followed past a line that can't be read
        self.number = line[0]
        self.size += len(line[1]) + 1
        if self.size > MAX_ROW_BYTES:
            raise too_big(Source(self._path, self.number), self.size)
        return line[1] + "\n"


def _column_names(cells: list[str], path: str, line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f'the header names the column "{twice}" twice; rename one', file=path, line=line)
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise InputError("the header has one column; separate the columns by commas", file=path, line=line)
    return names


def parquet_rows(path: str) -> Iterator[Row | RowError]:
    """Rows of a Parquet file, decoded a batch at a time; `line` is the 1-based row number. Raises InputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with _seekable(path) as file:
        try:
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(batch_size=PARQUET_BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(_without_nulls(fields), Source(path, number))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            what = str(error).splitlines()[0]
            raise InputError(f"the Parquet data cannot be read ({what}); write the file again", file=path) from None


@contextmanager
def _seekable(path: str) -> Iterator[Any]:
    """Parquet is read from its end, so a packed file is unpacked to disk first."""
    with open_data(path) as file:
        if not path.lower().endswith(".gz"):
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            while piece := file.read(2**20):
                unpacked.write(piece)
                if unpacked.tell() > MAX_UNPACKED_PARQUET:
                    limit = megabytes(MAX_UNPACKED_PARQUET)
                    raise InputError(f"the file unpacks to more than {limit}; unpack it first", file=path)
            unpacked.seek(0)
            yield unpacked


def _without_nulls(value: Any) -> Any:
    """Parquet fills in the keys a struct doesn't have with nulls; rows from JSONL don't have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
