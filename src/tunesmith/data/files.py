"""From a path to lines of text, in bounded memory, whatever the path turns out to be."""

from __future__ import annotations

import codecs
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tunesmith.data.rows import RowError
from tunesmith.errors import InputError
from tunesmith.types import Source

MAX_ROW_BYTES = 16 * 2**20
MAX_EXPANSION = 200  # a .gz file may not grow by more than this, once past EXPANSION_FREE bytes
EXPANSION_FREE = 256 * 2**20
UTF8_BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def megabytes(size: float) -> str:
    """A size in words: `megabytes(52_428_800) == "50 MB"`."""
    return f"{size / 2**20:,.0f} MB"


def bare_suffix(path: str) -> str:
    """The suffix that says the format, with `.gz` looked through: `rows.jsonl.gz` gives `.jsonl`."""
    name = Path(path).name.lower()
    return Path(name.removesuffix(".gz")).suffix


@contextmanager
def open_data(path: str) -> Iterator[BinaryIO]:
    """Open a data file for reading bytes, expanding `.gz`. Raises InputError, also for faults met while reading."""
    _refuse_what_is_no_file(path)
    try:
        with open(path, "rb") as raw:
            if path.lower().endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as expanded:
                    yield _Bounded(expanded, raw, path)  # type: ignore[misc]
            else:
                yield raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"the gzip data is damaged ({_reason(error)}); compress the file again", file=path) from None
    except OSError as error:
        raise InputError(f"the file cannot be read ({error.strerror or error})", file=path) from None


def _reason(error: Exception) -> str:
    return "it ends too early" if isinstance(error, EOFError) else str(error).lower()


def _refuse_what_is_no_file(path: str) -> None:
    """Look before opening: opening a FIFO would wait for ever."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise InputError("there is no such data file; check the path", file=path) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the file cannot be opened ({reason})", file=path) from None
    if stat.S_ISDIR(found.st_mode):
        raise InputError("this is a folder; name a data file in it", file=path)
    if not stat.S_ISREG(found.st_mode):
        raise InputError("this is a pipe or a device, not a file; save its content to a file first", file=path)
    if found.st_size == 0:
        raise InputError("the file is empty; it needs at least one row", file=path)


class _Bounded:
    """A gzip stream that refuses to grow without end."""

    def __init__(self, expanded: gzip.GzipFile, raw: BinaryIO, path: str) -> None:
        self._expanded, self._raw, self._path, self._size = expanded, raw, path, 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "an expanding file is read in pieces"
        return self._counted(self._expanded.read(size))

    def readline(self, size: int = -1) -> bytes:
        return self._counted(self._expanded.readline(size))

    def _counted(self, piece: bytes) -> bytes:
        self._size += len(piece)
        if self._size > EXPANSION_FREE and self._size > MAX_EXPANSION * self._raw.tell():
            raise InputError(
                f"the file expands to more than {MAX_EXPANSION} times its size, as a gzip bomb does; "
                "if it is honest data, unpack it first",
                file=self._path,
            )
        return piece


def text_lines(path: str) -> Iterator[tuple[int, str] | RowError]:
    """Every line of a UTF-8 file with its 1-based number, without its line end; a fault in one line is yielded.

    A byte-order mark at the start is dropped. Raises InputError for what no later line can mend.
    """
    with open_data(path) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1:
                line = _without_bom(line, path)
            if len(line) > MAX_ROW_BYTES:
                size = len(line) + _skip_to_line_end(file)
                yield too_big(Source(path, number), size)
                continue
            text = decode(line, Source(path, number))
            yield text if isinstance(text, RowError) else (number, text.rstrip("\r\n"))


def text_pieces(path: str, size: int) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of about `size` bytes, wherever its lines end. Raises InputError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with open_data(path) as file:
        piece = _without_bom(file.read(size), path)
        while True:
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise bad_utf8(Source(path, line)) from None
            if "\0" in text:
                raise nul_byte(Source(path, line + text[: text.index("\0")].count("\n")))
            line += text.count("\n")
            yield text
            if not piece:
                return
            piece = file.read(size)


def too_big(source: Source, size: int) -> RowError:
    return RowError(
        f"the row is {megabytes(size)} long and a row may have {megabytes(MAX_ROW_BYTES)}; split it, "
        "or check that rows are separated by line ends",
        rule="row-too-big",
        source=source,
    )


def bad_utf8(source: Source) -> RowError:
    return RowError("the text is not valid UTF-8; save the file as UTF-8", rule="bad-encoding", source=source)


def nul_byte(source: Source) -> RowError:
    return RowError("the line holds a NUL byte; remove it", rule="bad-encoding", source=source)


def decode(line: bytes, source: Source) -> str | RowError:
    """One line as text; a RowError where the bytes are not UTF-8 text."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return bad_utf8(source)
    return nul_byte(source) if "\0" in text else text


def _without_bom(line: bytes, path: str) -> bytes:
    for mark, name in OTHER_BOMS.items():
        if line.startswith(mark):
            raise InputError(f"the file is {name} text; save it as UTF-8", file=path, line=1)
    return line.removeprefix(UTF8_BOM)


def _skip_to_line_end(file: BinaryIO) -> int:
    """Read on, a piece at a time, to the end of an over-long line; gives the bytes skipped."""
    skipped = 0
    while piece := file.readline(2**20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
