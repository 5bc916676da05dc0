"""Rows laid aside come back as they were, and nothing of them outlives the process."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest
from data_rows import chat, recipe_data, varied, write_jsonl

from tunesmith.data import mapped
from tunesmith.data.formats import read_examples
from tunesmith.data.lazy import Lazy, evenly, joined
from tunesmith.data.stored import stored
from tunesmith.errors import InputError
from tunesmith.types import Example, Source

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"b": 1, "a": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"z": 1, "a": None}}}
EXAMPLES = [
    Example(
        "00",
        Source("a", 3),
        "chat",
        messages=({"role": "user", "content": "é\n"}, {"role": "assistant", "tool_calls": [CALL], "weight": 0}),
        tools=(TOOL,),
        columns={"topic": "x", "n": 1.5, "none": None, "list": [1, {"a": True}]},
    ),
    Example("01", Source("a", 4), "completion", prompt="", completion="c"),
    Example("02", Source("b", 1), "text", text="t" * 100_000),
    Example(
        "03",
        Source("b", 2),
        "preference",
        messages=({"role": "user", "content": "q"},),
        chosen=({"role": "assistant", "content": "1"},),
        rejected=({"role": "assistant", "content": "2"},),
    ),
    Example("04", Source("b", 3), "input", messages=({"role": "user", "content": "q"},)),
]


def test_rows_come_back_as_they_were(monkeypatch):
    monkeypatch.setattr(mapped, "BATCH_ROWS", 2)
    rows = stored((example, i) for i, example in enumerate(EXAMPLES))
    assert [*rows] == [example for i, example in enumerate(EXAMPLES) for _ in range(i)]
    assert [*rows[0].columns] == []
    assert [*rows[-2:]] == [EXAMPLES[4]] * 2
    assert [*stored((each, 1) for each in EXAMPLES)[0].tools[0]["function"]["parameters"]] == ["z", "a"]


def test_a_column_holds_what_json_can_say():
    (row,) = stored([(Example("00", Source("a", 1), "text", text="t", columns={"day": date(2026, 1, 2)}), 1)])
    assert row.columns == {"day": "2026-01-02"}


def test_no_row_is_no_row():
    assert len(stored([])) == 0


@pytest.mark.parametrize("rows", [varied(50), [chat("a", "b", topic=1)], [{"text": "only this"}]])
def test_no_file_with_rows_has_a_name(tmp_path, monkeypatch, rows):
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(mapped.tempfile, "tempdir", str(tmp_path / "temporary"))
    found = read_examples(recipe_data(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert len(found) == len(rows)
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
    assert [*(tmp_path / "temporary").iterdir()] == []
    assert (tmp_path / "home" / "cache").stat().st_mode & 0o777 == 0o700


def test_a_home_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    assert len(read_examples(recipe_data(write_jsonl(tmp_path / "rows.jsonl", varied(5))))) == 5


def test_a_disk_without_room_is_a_sentence(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", varied(5))
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr("tunesmith.data.stored.nameless_file", lambda: full)
        with pytest.raises(InputError, match=r"no room to lay the data aside in .*TMPDIR"):
            read_examples(recipe_data(path))


def test_lazy_sequences_are_sequences():
    some = Lazy(5, str)
    assert ([*some], some[-1], [*some[1:4:2]], [*some[::-1]]) == ([*"01234"], "4", ["1", "3"], [*"43210"])
    assert [*joined(some, ["x"])] == [*"01234x"]
    assert [*evenly("abcde", 2)] == ["a", "c"]
    assert [*evenly("ab", 5)] == ["a", "b"]
    assert [*evenly("", 3)] == []
    with pytest.raises(IndexError):
        some[5]


def test_memory_of_its_own_does_not_grow_with_the_rows(tmp_path):
    """100,000 rows of 2 kB: 200 MB that are read, and looked at twice."""
    held = []

    def rows():
        for i in range(100_000):
            yield Example(f"{i:016x}", Source("a", i), "text", text=f"{i} " * 300), 1

    before = own_memory()
    found = stored(rows())
    for i, row in enumerate(found):
        if i % 10_000 == 0:
            held.append((row.id, own_memory()))
    assert len(held) == 10
    assert max(own for _, own in held) - before < 60e6


def own_memory() -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
