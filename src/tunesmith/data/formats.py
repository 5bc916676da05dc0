"""The training and held-out rows of a recipe, read and laid aside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from tunesmith.data.files import bare_suffix
from tunesmith.data.hub import PREFIX
from tunesmith.data.interpret import (
    Format,
    detect,
    is_format,
    lacks_answer,
    refuse_alpaca,
    refuse_unknown,
    to_example,
    to_input,
)
from tunesmith.data.mapped import free_bytes, no_room, roomiest_folder
from tunesmith.data.rows import Row, RowError
from tunesmith.data.sources import read_rows
from tunesmith.data.stored import stored
from tunesmith.errors import InputError
from tunesmith.recipe import Data, TrainFile
from tunesmith.types import Example, Finding, Source


def silent(sentence: str) -> None:
    """Say nothing to nobody."""


def read_examples(
    data: Data,
    *,
    faults: list[Finding] | None = None,
    say: Callable[[str], None] = silent,
    inputs: bool = False,
) -> Sequence[Example]:
    """Every training row of the recipe's data section, in order, laid aside on disk.

    A bad row raises InputError; with `faults` given it is left out and a blocking Finding appended there instead.
    `say` is told in a sentence which format was found and why. A file of weight 2.5 gives each of its rows twice and
    half of them (always the same half) a third time; of weight 0.1 a tenth of them. Copies share their `source`.
    `inputs`: rows may leave the answer out (a teacher will give it).
    """
    reader = _Reader(data, faults, say, inputs)
    return stored(pair for file in data.train_files for pair in reader.counted(file))


def read_held_out(
    data: Data,
    *,
    faults: list[Finding] | None = None,
    say: Callable[[str], None] = silent,
    inputs: bool = False,
) -> Sequence[Example] | None:
    """The rows of the held-out file, or None where `data.held_out` is a fraction. Raises InputError."""
    if not isinstance(data.held_out, str):
        return None
    return stored(_Reader(data, faults, say, inputs).counted(TrainFile(path=data.held_out, weight=1.0)))


class _Reader:
    """Reads files that must agree in their format."""

    def __init__(
        self, data: Data, faults: list[Finding] | None, say: Callable[[str], None], inputs: bool = False
    ) -> None:
        self._data, self._faults, self._say, self._inputs = data, faults, say, inputs
        self._format: Format | None = None if data.format == "auto" else data.format
        self._first: Source | None = None

    def counted(self, file: TrainFile) -> Iterator[tuple[Example, int]]:
        """Every row of a file, and how often it is taken."""
        _refuse_without_room(file)
        rows = 0
        for row in read_rows(file.path):
            rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                example = self._example(row)
            except RowError as error:
                if self._faults is None:
                    raise
                self._faults.append(as_finding(error))
                continue
            yield example, _copies(example, file.weight)
        if not rows:
            raise InputError("the file holds no rows; it needs at least one", file=file.path)

    def _example(self, row: Row) -> Example:
        auto = self._data.format == "auto"
        if self._inputs and lacks_answer(row.fields):
            return to_input(row, self._data.system)
        if self._format is None:
            found = detect(row.fields)
            if found is None:
                refuse_unknown(row)
            self._format, self._first = found[0], row.source
            self._say(f"data format: {found[0]}, because {row.source} has {found[1]}")
        elif auto and not is_format(row.fields, self._format):
            self._refuse_mixed(row)
        if auto and self._format == "input_output" and "instruction" in row.fields:
            refuse_alpaca(row)
        return to_example(row, self._format, self._data.system)

    def _refuse_mixed(self, row: Row) -> None:
        """A row of another known format is named together with the row that set the format."""
        other = detect(row.fields)
        if other is not None:
            raise RowError(
                f"the row has format {other[0]} ({other[1]}) but {self._first} has format {self._format}; "
                "use one format, or put the rows in separate runs",
                rule="mixed-formats",
                source=row.source,
            )


def as_finding(error: RowError) -> Finding:
    """A row that can't be read, as the gate reports it."""
    reason, _, remedy = error.reason.partition("; ")
    return Finding(
        error.rule, "block", reason, remedy or "mend or remove the row", error.source.file, (error.source.line,)
    )


def _copies(example: Example, weight: float) -> int:
    """How often a row of this weight is taken. The part after the point is decided by the row's content."""
    whole = int(weight)
    place = int(example.id, 16) / 16 ** len(example.id)  # uniform in [0, 1)
    return whole + (place < weight - whole)


def _refuse_without_room(file: TrainFile) -> None:
    """Refuse at once what would be refused after minutes of reading."""
    if file.path.startswith(PREFIX) or file.path.endswith(".gz") or bare_suffix(file.path) == ".parquet":
        return
    if os.path.isfile(file.path) and os.path.getsize(file.path) * min(1.0, file.weight) > free_bytes(roomiest_folder()):
        raise no_room()
