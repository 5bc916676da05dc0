"""Rows from any file a recipe may name, streamed, each with its file and 1-based line."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tunesmith.data.files import MAX_ROW_BYTES, bare_suffix, text_lines, too_big
from tunesmith.data.hub import PREFIX, hub_rows
from tunesmith.data.json_array import json_rows
from tunesmith.data.json_rows import jsonl_rows
from tunesmith.data.rows import Row, RowError
from tunesmith.data.tables import csv_rows, parquet_rows
from tunesmith.errors import InputError
from tunesmith.types import Source


def read_rows(path: str) -> Iterator[Row | RowError]:
    """Stream the rows of a file or hub data set, chosen by its suffix (a `.gz` behind it is looked through).

    A fault of one row is yielded in its place. Raises InputError where reading can't go on.
    """
    if path.startswith(PREFIX):
        return hub_rows(path)
    reader = READERS.get(bare_suffix(path))
    if reader is None:
        known = ", ".join(READERS)
        raise InputError(f"the file's name doesn't say what it is; known endings are {known}, each also .gz", file=path)
    return reader(path)


def tsv_rows(path: str) -> Iterator[Row | RowError]:
    return csv_rows(path, delimiter="\t")


def paragraph_rows(path: str) -> Iterator[Row | RowError]:
    """Plain text and Markdown: a row a paragraph, paragraphs being separated by blank lines."""
    paragraph: list[str] = []
    start = size = number = 0
    for line in text_lines(path):
        if isinstance(line, RowError):
            yield line
            continue
        number, text = line
        if text.strip():
            start = start or number
            paragraph.append(text)
            size += len(text) + 1
            if size <= MAX_ROW_BYTES:
                continue
            raise too_big(Source(path, start), size)
        if paragraph:
            yield _paragraph(paragraph, path, start)
        paragraph, start, size = [], 0, 0
    if paragraph:
        yield _paragraph(paragraph, path, start)


def _paragraph(lines: list[str], path: str, start: int) -> Row:
    return Row({"text": "\n".join(lines)}, Source(path, start))


READERS: dict[str, Callable[[str], Iterator[Row | RowError]]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
    ".txt": paragraph_rows,
    ".md": paragraph_rows,
}
