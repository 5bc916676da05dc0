"""Rows from a `.json` file, streamed: an array of objects, or an object with such an array under "data"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from tunesmith.data.files import MAX_ROW_BYTES, text_lines, text_pieces, too_big
from tunesmith.data.json_rows import DECODER, json_fault, jsonl_rows, parse_object
from tunesmith.data.rows import Row, RowError
from tunesmith.errors import InputError
from tunesmith.types import Source

PIECE = 2**18  # bytes read at a time


def json_rows(path: str) -> Iterator[Row | RowError]:
    """Rows of a `.json` file, which may turn out to be JSONL under another name.

    A row's `line` is its 1-based place in the array, because arrays are often written on one line. A syntax error
    is named by the line of the file and ends the reading: where the next row starts can't be known.
    """
    if _is_json_lines(path):
        yield from jsonl_rows(path)
        return
    text = _Scanner(path)
    if text.take("["):
        yield from _elements(text)
    elif text.take("{"):
        yield from _members(text)
    else:
        text.fail("a JSON file of rows starts with [ or {")
    if text.peek():
        text.fail("there is text after the end of the JSON value")


def _is_json_lines(path: str) -> bool:
    """True when the first line is by itself an object that is a row."""
    for line in text_lines(path):
        if isinstance(line, RowError):
            return False
        if line[1].strip():
            found = parse_object(line[1], Source(path, line[0]))
            return isinstance(found, dict) and not isinstance(found.get("data"), list)
    return False


def _elements(text: _Scanner) -> Iterator[Row | RowError]:
    """The elements of an array whose bracket has been taken, as rows."""
    number = 0
    if text.take("]"):
        return
    while True:
        number += 1
        value = text.value()
        source = Source(text.path, number)
        if isinstance(value, dict):
            yield Row(value, source)
        else:
            yield RowError("this element of the array is not an object", rule="broken-json", source=source)
        if text.take("]"):
            return
        if not text.take(","):
            text.fail(f"expecting , or ] after row {number}" if text.peek() else f"the array ends after row {number}")


def _members(text: _Scanner) -> Iterator[Row | RowError]:
    """`{"version": 1, "data": [...]}` gives the rows of "data"; any other object is one row."""
    fields: dict[str, Any] = {}
    found = False
    while not text.take("}"):
        key = text.value()
        if not isinstance(key, str) or not text.take(":"):
            text.fail('expecting a key such as "data" and a colon')
        if key in fields or (found and key == "data"):
            text.fail(f'the key "{key}" stands twice in one object; keep one')
        if key == "data" and text.take("["):
            found = True
            yield from _elements(text)
        else:
            fields[key] = text.value()
        if not text.take(",") and text.peek() != "}":
            text.fail("expecting , or }")
    if not found:
        yield Row(fields, Source(text.path, 1))


class _Scanner:
    """JSON text read a piece at a time and parsed a value at a time: never much more than one row in memory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._pieces = text_pieces(path, PIECE)
        self._text, self._at, self._lines_before, self._ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that isn't white space, "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._read_on():
                return ""

    def take(self, character: str) -> bool:
        """Step over the next character if it is this one."""
        if self.peek() != character:
            return False
        self._at += 1
        return True

    def value(self) -> Any:
        """The next JSON value. Raises InputError."""
        self.peek()
        tried = 0
        while True:
            whole = self._ended
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if whole or not isinstance(error, json.JSONDecodeError):
                    self._fail_at(error)
            else:
                if whole or isinstance(value, (dict, list, str)) or end < len(self._text):
                    self._at = end  # a number at the edge may go on: 12 of 123
                    return value
            # Perhaps the value isn't whole yet. Doubling what is read keeps the retries linear in its size.
            tried = max(PIECE, 2 * tried)
            if len(self._text) - self._at > MAX_ROW_BYTES:
                raise too_big(Source(self.path, self._line(self._at)), len(self._text) - self._at)
            self._read_on(tried)

    def fail(self, what: str) -> NoReturn:
        """Raise InputError for a fault at the present place."""
        raise InputError(f"not valid JSON: {what}", file=self.path, line=self._line(self._at))

    def _fail_at(self, error: Exception) -> NoReturn:
        if isinstance(error, json.JSONDecodeError):
            what, line = error.msg[:1].lower() + error.msg[1:], self._line(error.pos)
            raise InputError(f"not valid JSON: {what} at column {error.colno}", file=self.path, line=line) from None
        raise json_fault(error, Source(self.path, self._line(self._at))) from None

    def _line(self, at: int) -> int:
        return self._lines_before + self._text.count("\n", 0, at) + 1

    def _read_on(self, wanted: int = PIECE) -> bool:
        """Drop what was parsed and read about `wanted` characters more; False at the end of the file."""
        self._lines_before += self._text.count("\n", 0, self._at)
        kept, size = [self._text[self._at :]], 0
        while size < wanted and not self._ended:
            piece = next(self._pieces, None)
            self._ended = piece is None
            kept.append(piece or "")
            size += len(kept[-1])
        self._text, self._at = "".join(kept), 0
        return size > 0
