"""Rows that were read, laid aside on disk: an Arrow file of this process, mapped, from which each is decoded anew."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from tunesmith.data.lazy import Lazy
from tunesmith.data.mapped import ArrowTable, ArrowWriter, map_file, nameless_file, needs_room
from tunesmith.types import Example, Source

PARTS = ("messages", "tools", "prompt", "completion", "text", "chosen", "rejected")  # what an example says
TURNS = frozenset(("messages", "tools", "chosen", "rejected"))  # of these, tuples


def stored(counted: Iterable[tuple[Example, int]]) -> Sequence[Example]:
    """Lay examples aside as they come, each to be met so many times in a row. Only 8 bytes of each stay in memory.

    What columns hold is what JSON can say: a date becomes its text. Raises InputError where the disk has no room.
    """
    import pyarrow as pa

    numbers, count = array("q"), 0
    with nameless_file() as file:
        writer = ArrowWriter(file, pa.schema([("row", pa.string())]))
        for example, copies in counted:
            if copies:
                source = example.source
                place = json.dumps([example.id, source.file, source.line, example.kind])
                content = f"[{place}, {content_of(example, columns=True)}]"
                with needs_room():
                    writer.add(len(content), content)
                numbers.extend([count] * copies)
                count += 1
        with needs_room():
            writer.close()
            file.flush()
        table = ArrowTable(map_file(file))
    return Lazy(len(numbers), lambda i: _example(table, numbers[i]))


def content_of(example: Example, *, columns: bool) -> str:
    """What an example says, as JSON; its `columns` where they are wanted."""
    parts: dict[str, Any] = {name: value for name in PARTS if (value := getattr(example, name)) not in (None, ())}
    if columns and example.columns:
        parts["columns"] = example.columns
    return json.dumps(parts, ensure_ascii=False, default=str)


def _example(table: ArrowTable, number: int) -> Example:
    batch, row = table.place(number)
    (id, file, line, kind), parts = json.loads(table.batches[batch][0][row].as_py())
    for name in TURNS & parts.keys():
        parts[name] = tuple(parts[name])
    return Example(id, Source(file, line), kind, **parts)
