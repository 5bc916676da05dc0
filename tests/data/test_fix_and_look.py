"""The cleaned copy, the coloured rows and the pictures: the original untouched, nothing private shown."""

from __future__ import annotations

import csv
import io
import json

import pytest
from data_rows import chat, checked, examples_of, recipe_data, varied, write_jsonl
from rich.console import Console

from tunesmith.data.checks import gate
from tunesmith.data.fix import fix, write_fixed
from tunesmith.data.look import masked_pieces, pictures, show_rows
from tunesmith.errors import InputError
from tunesmith.recipe import Data


def test_a_cleaned_copy_says_what_went_and_leaves_the_original(tmp_path):
    good = varied(30)
    path = write_jsonl(tmp_path / "rows.jsonl", [*good, good[3], '{"broken', {"input": "x", "output": " "}])
    before = (tmp_path / "rows.jsonl").read_bytes()
    said = write_fixed(gate(recipe_data(path)), tmp_path / "clean.jsonl")
    assert "1 row removed by duplicates" in said
    assert "1 row removed by broken-json" in said
    assert "1 row removed by empty-answer" in said
    assert "30 rows of 33 written" in said
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert kept == good
    again = gate(recipe_data(str(tmp_path / "clean.jsonl")))
    assert not again.blocked
    assert not again.removable


def test_kept_lines_stay_as_they_were(tmp_path):
    odd = '{"output":  "b",   "input":"\\u00e9"}'
    path = write_jsonl(tmp_path / "rows.jsonl", [odd, *varied(10)])
    write_fixed(gate(recipe_data(path)), tmp_path / "clean.jsonl")
    assert (tmp_path / "clean.jsonl").read_text().splitlines()[0] == odd


def test_leaked_rows_leave_the_training_file(tmp_path):
    rows = varied(60)
    train, held_out = write_jsonl(tmp_path / "t.jsonl", rows[:50]), write_jsonl(tmp_path / "h.jsonl", rows[45:])
    write_fixed(gate(recipe_data(train, held_out=held_out)), tmp_path / "clean.jsonl")
    report = gate(recipe_data(str(tmp_path / "clean.jsonl"), held_out=held_out))
    assert (report.blocked, report.counts["train"]) == (False, 45)


@pytest.mark.parametrize("out", ["clean.csv", "clean.jsonl"])
def test_tables(tmp_path, out):
    rows = [*varied(20), varied(1)[0]]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["input", "output"])
        table.writeheader()
        table.writerows(rows)
    fix(gate(recipe_data(str(path))), str(path), tmp_path / out)
    report = gate(recipe_data(str(tmp_path / out)))
    assert report.counts["train"] + report.counts["held_out"] == 20


def test_where_a_copy_cannot_go(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", varied(5))
    report = gate(recipe_data(path))
    for out, what in (
        (path, "exists already"),
        ("clean.parquet", "is written as"),
        ("no/clean.jsonl", "no such folder"),
    ):
        with pytest.raises(InputError, match=what):
            fix(report, path, tmp_path / out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    two = Data.model_validate({"train": [{"path": path}, {"path": path}]})
    with pytest.raises(InputError, match="one file at a time"):
        write_fixed(gate(two), tmp_path / "clean.jsonl")


def shown(renderable):
    console = Console(width=200, record=True, file=io.StringIO(), color_system="standard")
    console.print(renderable)
    return console.export_text(styles=True)


def test_rows_are_shown_as_the_model_sees_them(tmp_path, renderer):
    examples = examples_of(tmp_path, [chat("the question", "the answer"), chat("second", "b"), chat("third", "c")])
    text = shown(show_rows(examples, renderer, 2))
    assert "rows.jsonl line 1: " in text
    assert "the question" in text
    assert "third" not in text
    trained = text.split("\x1b[1;32m")[1].split("\x1b[0m")[0]  # bold green
    assert trained == "the answer<|im_end|>"


def test_private_data_is_masked_where_rows_are_shown(tmp_path, renderer):
    examples = examples_of(tmp_path, [chat("Write to jane.doe@example.org", "I will")])
    text = shown(show_rows(examples, renderer, 1))
    assert "jane" not in text
    assert "example.org" not in text
    assert masked_pieces(["a b@", "c.d", "e f"]) == ["a ••", "•••", "• f"]


def test_the_report_holds_rows_token_by_token_and_nothing_private(tmp_path, renderer):
    rows = [chat("Write to jane.doe@example.org", f"the answer {i}") for i in range(30)]
    report = checked(tmp_path, rows, renderer=renderer)
    shown = report.to_json()["shapes"]["rows"]
    assert len(shown) == 6
    assert len({row["source"] for row in shown}) == 6
    assert "jane" not in json.dumps(report.to_json())
    tokens = shown[0]["tokens"]
    assert "".join(piece for piece, trained in tokens if trained) == "the answer 0<|im_end|>"
    assert shown[0]["of"] == len(tokens)


def test_pictures_are_vega_lite_that_renders(tmp_path):
    import vl_convert

    report = checked(tmp_path, varied(100, lambda i: ["yes", "no"][i % 2]) + varied(9, lambda i: "no"))
    found = pictures(report.shapes)
    assert list(found) == ["Length of the inputs", "Length of the answers", "Labels"]
    rows = found["Length of the inputs"]["data"]["values"]
    assert sum(row["rows"] for row in rows) == 109
    for spec in found.values():
        assert vl_convert.vegalite_to_svg({**spec, "width": 300}).startswith("<svg")
