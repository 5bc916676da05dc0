"""Every kind of file, and every way a file can be wrong: one sentence with its place, memory bounded."""

from __future__ import annotations

import gzip
import json
import os
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data import files
from tunesmith.data.rows import Row, RowError
from tunesmith.data.sources import read_rows
from tunesmith.errors import InputError

ROWS = [{"input": "a", "output": "b"}, {"input": 'say "hi",\nplease', "output": "ß 日本"}]


def fields(path: Path) -> list[dict]:
    rows = list(read_rows(str(path)))
    assert all(isinstance(row, Row) for row in rows), rows
    return [dict(row.fields) for row in rows]


def fault(path: Path) -> RowError:
    return next(row for row in read_rows(str(path)) if isinstance(row, RowError))


def raise_faults(path: Path) -> None:
    """Read without keeping anything."""
    for row in read_rows(str(path)):
        if isinstance(row, RowError):
            raise row


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
CONTENTS = {
    "jsonl": JSONL,
    "ndjson": JSONL.replace(b"\n", b"\r\n") + b"\r\n\r\n",
    "json": json.dumps(ROWS, indent=2).encode(),
    "csv": 'input,output\na,b\n"say ""hi"",\nplease",ß 日本\n'.encode(),
    "tsv": 'input\toutput\r\na\tb\r\n"say ""hi"",\r\nplease"\tß 日本\r\n'.encode(),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_the_same_rows_from_every_kind(tmp_path, kind, packed):
    assert fields(write(tmp_path / f"rows.{kind}{packed}", CONTENTS[kind])) == ROWS


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_parquet(tmp_path, packed):
    whole = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([*ROWS, {"input": None, "output": "c"}]), whole)
    path = whole if not packed else write(tmp_path / "rows.parquet.gz", whole.read_bytes())
    assert fields(path) == [*ROWS, {"output": "c"}]


@pytest.mark.parametrize(
    "text",
    [
        '{"data": [{"a": 1}, {"a": 2}]}',
        '{"version": 1.5, "data": [{"a": 1}, {"a": 2}], "licence": {"name": "MIT"}}',
        '[{"a": 1},\n\n{"a": 2}]',
        '{"a": 1}\n{"a": 2}\n',
    ],
)
def test_json_in_its_forms(tmp_path, text):
    assert fields(write(tmp_path / "rows.json", text.encode())) == [{"a": 1}, {"a": 2}]


def test_a_json_array_of_one_long_line_is_streamed(tmp_path):
    rows = [{"text": "x" * 1000, "n": i} for i in range(2000)]
    path = write(tmp_path / "rows.json", json.dumps(rows).encode())
    found = list(read_rows(str(path)))
    assert [row.fields["n"] for row in found] == list(range(2000))
    assert [row.source.line for row in found[:3]] == [1, 2, 3]


def test_paragraphs_of_text_and_markdown(tmp_path):
    path = write(tmp_path / "book.md", b"# One\nfirst\n\n\n  \nsecond\r\nline\n")
    found = list(read_rows(str(path)))
    assert [(row.fields["text"], row.source.line) for row in found] == [("# One\nfirst", 1), ("second\nline", 6)]


def test_lines_are_counted_through_blank_ones_and_quoted_ones(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", b'{"a": 1}\n\n\n{"a": 2}\n')
    table = write(tmp_path / "a.csv", b'a,b\n"x\ny\nz",1\n\nw,2\n')
    assert [row.source.line for row in read_rows(str(jsonl))] == [1, 4]
    assert [row.source.line for row in read_rows(str(table))] == [2, 6]


def test_a_byte_order_mark_is_dropped(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.json"):
        content = {"a.jsonl": b'{"a": "1"}', "a.csv": b"a\n1\n", "a.json": b'[{"a": "1"}]'}[name]
        assert fields(write(tmp_path / name, b"\xef\xbb\xbf" + content)) == [{"a": "1"}]


@pytest.mark.parametrize(
    ("line", "rule", "what"),
    [
        (b'{"a": 1', "broken-json", "expecting ',' delimiter at column 8"),
        (b"nonsense", "broken-json", "expecting value at column 1"),
        (b"[1, 2]", "broken-json", "holds an array"),
        (b'"text"', "broken-json", "holds a string"),
        (b'{"a": NaN}', "broken-json", "NaN is not a JSON value"),
        (b'{"a": 1} {"a": 2}', "broken-json", "extra data at column 10"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate-key", 'the key "c" stands twice'),
        (b'{"a": "\xff"}', "bad-encoding", "not valid UTF-8"),
        (b'{"a": "\x00"}', "bad-encoding", "NUL byte"),
        (b"[" * 100_000, "broken-json", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken-json", "not valid JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_next_is_read(tmp_path, line, rule, what):
    path = write(tmp_path / "rows.jsonl", b'{"ok": 1}\n' + line + b'\n{"ok": 2}\n')
    first, bad, last = read_rows(str(path))
    assert (first.fields, last.fields, last.source.line) == ({"ok": 1}, {"ok": 2}, 3)
    assert isinstance(bad, RowError)
    assert bad.rule == rule
    assert str(bad).startswith(f"{path} line 2: ")
    assert what in str(bad)


@pytest.mark.parametrize(
    ("name", "content", "line", "what"),
    [
        ("a.json", b'[{"a": 1},\n{"a": }]', 2, "expecting value"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', 2, "expecting , or ]"),
        ("a.json", b'[{"a": 1},\n', 2, "expecting value"),
        ("a.json", b'[{"a": 1}] x', 1, "after the end"),
        ("a.json", b"17", 1, "starts with [ or {"),
        ("a.json", b'{"data": [{"a": 1}], "data": []}', 1, "stands twice"),
        ("a.json", b'[{"a": 1},\n\n{"a": "\xff"}]', 3, "not valid UTF-8"),
        ("a.json", b'[{"a": "\x00"}]', 1, "NUL byte"),
        ("a.csv", b'a,b\n1,"x\n', 2, "not valid CSV"),
        ("a.csv", b"a,a\n1,2\n", 1, "twice"),
        ("a.csv", b"a;b\n1;2\n", 1, "by commas"),
        ("a.csv", b"a,b\n1,\xff\n", 2, "not valid UTF-8"),
        ("a.jsonl", b"\xff\xfe{\x00", 1, "UTF-16"),
        ("a.parquet", b"PAR1nonsense", None, "Parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-20], None, "gzip"),
        ("b.jsonl.gz", b"not gzip", None, "gzip"),
        ("a.docx", b"x", None, "known endings"),
        ("a.jsonl", b"", None, "empty"),
    ],
)
def test_what_ends_the_reading_is_one_sentence(tmp_path, name, content, line, what):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_rows(str(path)))
    assert error.value.line == line
    assert what in str(error.value)
    assert "\n" not in str(error.value)


def test_a_csv_row_of_another_width_is_named(tmp_path):
    bad = fault(write(tmp_path / "a.csv", b"a,b\n1,2\n1,2,3\n"))
    assert (bad.source.line, bad.rule) == (3, "bad-table")


def test_what_is_no_file(tmp_path):
    fifo = tmp_path / "pipe.jsonl"
    os.mkfifo(fifo)
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    for path, what in ((fifo, "pipe"), (folder, "folder"), (tmp_path / "none.jsonl", "no such data file")):
        with pytest.raises(InputError, match=what):
            list(read_rows(str(path)))
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_rows("a\0b.jsonl"))


def test_a_line_of_50_mb_is_refused_and_the_next_is_read(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": "' + b"x" * (50 * 2**20) + b'"}\n{"a": "short"}\n')
    bad, good = read_rows(str(path))
    assert isinstance(bad, RowError)
    assert "the row is 50 MB long and a row may have 16 MB" in str(bad)
    assert (good.fields, good.source.line) == ({"a": "short"}, 2)


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.json.gz", "bomb.csv.gz", "bomb.txt.gz"])
def test_a_gzip_bomb_stays_bounded(tmp_path, name):
    path = tmp_path / name
    zeros = gzip.compress(b"a" * 2**24, compresslevel=9) * 30  # 480 MB in 480 KB, as one line
    path.write_bytes(zeros)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        raise_faults(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_a_bomb_of_many_short_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "EXPANSION_FREE", 2**20)
    path = write(tmp_path / "bomb.jsonl.gz", b'{"a": 1}\n' * 400_000)
    with pytest.raises(InputError, match="gzip bomb"):
        raise_faults(path)


def test_hub_sources_respect_offline(monkeypatch):
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    with pytest.raises(InputError, match="TUNESMITH_OFFLINE"):
        list(read_rows("hub:owner/name:train"))
    with pytest.raises(InputError, match="hub:owner/name:split"):
        list(read_rows("hub:a b"))


def test_hub_sources_name_the_extra_where_datasets_is_missing(monkeypatch):
    monkeypatch.delenv("TUNESMITH_OFFLINE", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'tunesmith\[hub\]'"):
        list(read_rows("hub:owner/name:train"))
