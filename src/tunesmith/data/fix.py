"""A cleaned copy of a data file: the rows the gate would leave out are left out, all others stay as they are."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data import wording
from tunesmith.data.files import bare_suffix, text_lines
from tunesmith.data.hub import PREFIX
from tunesmith.data.report import DataReport
from tunesmith.data.rows import Row, RowError
from tunesmith.data.sources import read_rows
from tunesmith.errors import InputError
from tunesmith.types import Source

LINE_FILES = (".jsonl", ".ndjson")


def write_fixed(report: DataReport, out: str | Path) -> str:
    """`fix` for the one training file of a recipe; its sentences as one text. Raises InputError."""
    if len(report.train_files) != 1:
        raise InputError("a cleaned copy is made of one file at a time; name one data file instead of the recipe")
    return "\n".join(fix(report, report.train_files[0], out))


def fix(report: DataReport, path: str, out: str | Path) -> list[str]:
    """Write `path` without the rows the report can do without, to `out`; gives sentences that say what went and why.

    JSONL stays JSONL, line by line as it was; CSV may become CSV; anything may become JSONL. Never touches the
    original; `out` must not exist. Raises InputError.
    """
    out = Path(out)
    _refuse_target(path, out)
    gone: Counter[str] = Counter()
    kept = 0
    partial = out.with_name(out.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            write = _writer(path, out, file)
            for source, value in _rows(path):
                rule = report.removable.get(source) or (value.rule if isinstance(value, RowError) else None)
                if rule is not None:
                    gone[rule] += 1
                elif not isinstance(value, RowError):
                    write(value)
                    kept += 1
        os.replace(partial, out)
    except OSError as error:
        raise InputError(f"the cleaned copy cannot be written ({error.strerror})", file=out) from None
    finally:
        partial.unlink(missing_ok=True)
    said = [f"{wording.count(count, 'row')} removed by {rule}" for rule, count in gone.most_common()]
    return [*said, f"{wording.count(kept, 'row')} of {kept + gone.total():,} written to {out}; {path} is as it was"]


def _refuse_target(path: str, out: Path) -> None:
    if path.startswith(PREFIX):
        raise InputError("a hub data set has no file to clean; save it as JSONL first", file=path)
    if out.exists():
        raise InputError("the file exists already; name a new one for the cleaned copy", file=out)
    if out.suffix not in LINE_FILES and not (out.suffix in (".csv", ".tsv") and bare_suffix(path) == out.suffix):
        raise InputError("a cleaned copy is written as .jsonl (a .csv also as .csv); name it so", file=out)
    if not out.parent.is_dir():
        raise InputError("there is no such folder to write the cleaned copy to; make it first", file=out)


def _rows(path: str) -> Iterator[tuple[Source, Any]]:
    """Every row with its place: JSONL as its line of text, other files as Row or RowError."""
    if bare_suffix(path) not in LINE_FILES:
        yield from ((row.source, row) for row in read_rows(path))
        return
    for line in text_lines(path):
        if isinstance(line, RowError):
            yield line.source, line
        elif line[1].strip():
            yield Source(path, line[0]), line[1]


def _writer(path: str, out: Path, file: Any) -> Any:
    """A function that writes one row."""
    if out.suffix in LINE_FILES:
        return lambda row: file.write(_as_line(row) + "\n")
    table = csv.writer(file, delimiter="\t" if out.suffix == ".tsv" else ",", lineterminator="\n")
    header: list[str] = []

    def write(row: Row) -> None:
        if not header:
            header.extend(row.fields)
            table.writerow(header)
        table.writerow(row.fields.values())

    return write


def _as_line(row: Row | str) -> str:
    return row if isinstance(row, str) else json.dumps(dict(row.fields), ensure_ascii=False, default=str)
