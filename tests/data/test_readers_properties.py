"""Whatever rows are written are read back; whatever bytes are read, the only error is a sentence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random

import pytest
from data_rows import chat, recipe_data, varied, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.data.checks import gate
from tunesmith.data.formats import read_examples
from tunesmith.data.parts import answer_text, input_text
from tunesmith.data.rows import Row
from tunesmith.data.sources import read_rows
from tunesmith.errors import InputError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
WORDS = st.text(CHARACTERS, max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(WORDS, VALUES, min_size=1, max_size=4), min_size=1, max_size=6)


def fields(path):
    rows = list(read_rows(str(path)))
    assert all(isinstance(row, Row) for row in rows), rows
    return [dict(row.fields) for row in rows]


@QUICK
@given(ROWS, st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_jsonl_is_read_back(tmp_path, rows, escaped, packed, end):
    text = "".join(json.dumps(row, ensure_ascii=escaped) + end for row in rows).encode()
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(text) if packed else text)
    assert fields(path) == rows


@QUICK
@given(ROWS, st.sampled_from([None, 0, 2]), st.booleans())
def test_json_arrays_are_read_back(tmp_path, rows, indent, under_data):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 2, "data": rows} if under_data else rows, indent=indent), encoding="utf-8")
    assert fields(path) == rows


@QUICK
@given(ROWS, st.integers(1, 40))
def test_json_arrays_are_read_back_whatever_the_pieces(tmp_path, rows, size):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.data.json_array.PIECE", size)
        assert fields(path) == rows


CELLS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from(['"', ",", "\n", "'", ";"]), max_size=20
)


@QUICK
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_csv_is_read_back(tmp_path, rows):
    text = io.StringIO()
    table = csv.writer(text, quoting=csv.QUOTE_ALL)
    table.writerows([("input", "output"), *rows])
    path = tmp_path / "rows.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    assert [(row["input"], row["output"]) for row in fields(path)] == rows


@QUICK
@given(st.lists(st.tuples(WORDS.filter(str.strip), WORDS.filter(str.strip)), min_size=1, max_size=5))
def test_examples_keep_every_character(tmp_path, pairs):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input": a, "output": b} for a, b in pairs])
    examples = read_examples(recipe_data(path))
    assert [(input_text(example), answer_text(example)) for example in examples] == pairs


def seeds():
    """A good file of every kind."""
    rows = [*varied(4), {"input": "naïve 日本", "output": '{"a": [1, 2]}'}]
    turns = [chat("q", "a", "q2", "a2", tools=[{"type": "function", "function": {"name": "f"}}]) for _ in range(3)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    yield "rows.jsonl", lines
    yield "turns.jsonl", "\n".join(json.dumps(row) for row in turns).encode()
    yield "rows.json", json.dumps(rows, indent=1).encode()
    yield "rows.jsonl.gz", gzip.compress(lines)
    yield "rows.csv", b'input,output\n"a ""b"", c\nd",e\nf,g\n'
    yield "rows.txt", b"one\n\ntwo\nthree\n"
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    yield "rows.parquet", sink.getvalue()


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content with a few bytes changed, removed, doubled or put in."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        at, length = chance.randrange(len(data) + 1), chance.randint(1, 12)
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at:at] = chance.choice(
                    [b'"', b"{", b"}", b"[", b"]", b",", b"\n", b"\0", b"\xff", b"\r", b"\\u", b"null"]
                )
            case _:
                del data[at:]
    return bytes(data)


def fuzz(folder, count: int, seed: int) -> int:
    """Run the gate on mutated files; anything but InputError escapes. Gives how many were refused."""
    files, sentences = list(seeds()), list[str]()
    for number in range(count):
        chance = random.Random(seed * 1_000_003 + number)
        name, content = files[number % len(files)]
        path = folder / name
        path.write_bytes(mutated(content, chance))
        try:
            gate(recipe_data(str(path), held_out=0.3))
        except InputError as error:
            sentences.append(str(error))
    assert not any("\n" in sentence for sentence in sentences)
    return len(sentences)


def test_mutated_files_never_raise_anything_but_a_sentence(tmp_path):
    refused = fuzz(tmp_path, 350, seed=1)
    assert 20 < refused < 340  # the mutations reach both ends
