"""Scorers against values worked out by hand, and against sacrebleu and scikit-learn."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import sentence_chrf
from sklearn.metrics import f1_score

from tunesmith.errors import InputError
from tunesmith.prove.json_answers import InvalidJson, find_json, parse_json
from tunesmith.prove.json_scorers import json_exact, json_fields, json_schema, json_valid
from tunesmith.prove.measures import macro_f1
from tunesmith.prove.rows import Row
from tunesmith.prove.scorers import (
    LabelReader,
    Scorer,
    chrf,
    contains,
    exact_match,
    label,
    longest_common_subsequence,
    regex,
    rouge_l,
)
from tunesmith.prove.scoring import choose_scorers, python_grader, score_answer
from tunesmith.prove.task import detect_task
from tunesmith.types import Item, Source


def item(expected, question="q", **columns):
    return Item(
        "a1", Source("rows.jsonl", 1), ({"role": "user", "content": question},), expected=expected, columns=columns
    )


@pytest.mark.parametrize(
    ("scorer", "output", "expected", "score"),
    [
        (exact_match(), " yes \n", "yes", 1.0),
        (exact_match(), "Yes", "yes", 0.0),
        (contains(), "It is PARIS, of course", "paris", 1.0),
        (contains(), "", "paris", 0.0),
        (regex(r"^\d{3}$"), "123", None, 1.0),
        (regex(r"^\d{3}$"), "1234", None, 0.0),
        # LCS of (the cat sat) and (the black cat sat down) is 3 words: 2·3 / (3 + 5)
        (rouge_l(), "The cat sat.", "the black cat sat down", 6 / 8),
        (rouge_l(), "", "", 1.0),
        (rouge_l(), "", "x", 0.0),
        # a, b answered; a, c expected; a alone is right: 2·1 / (2 + 2)
        (json_fields(), '{"a": 1, "b": 2}', '{"a": 1, "c": 3}', 0.5),
        (json_fields(), '{"b": {"d": "x "}, "a": 1.0}', '{"a": 1, "b": {"d": "x"}}', 1.0),
        (json_fields(), '{"t": ["y", "x"]}', '{"t": ["x", "y"]}', 1.0),
        (json_fields(), '{"t": ["x"]}', '{"t": ["x", "x"]}', 2 / 3),
        (json_fields(), '{"a": true}', '{"a": 1}', 0.0),
        (json_fields(), "no JSON at all", '{"a": 1}', 0.0),
        (json_fields(), '{"a": NaN}', '{"a": 1}', 0.0),
        (json_fields(), '```json\n{"a": 1}\n```', '{"a": 1}', 1.0),
        (json_fields(), 'Here it is: {"a": 1}. Anything else?', '{"a": 1}', 1.0),
        (json_fields(), "{}", "{}", 1.0),
        (json_exact(), '{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1.0),
        (json_exact(), '{"t": ["y", "x"]}', '{"t": ["x", "y"]}', 0.0),
        (json_exact(), '{"a": true}', '{"a": 1}', 0.0),
        (json_valid(), ' {"a": [1, null]} ', None, 1.0),
        (json_valid(), '```json\n{"a": 1}\n```', None, 0.0),
        (json_valid(), '{"a": Infinity}', None, 0.0),
        (json_valid(), '{"a": 1, "a": 2}', None, 1.0),
        (json_fields(), '{"a": 1, "a": 2}', '{"a": 2}', 1.0),
        (json_fields(), '{"a": 1, "a": 2}', '{"a": 1}', 0.0),
        (json_schema({"required": ["a"]}), '{"a": 1}', None, 1.0),
        (json_schema({"required": ["a"]}), '{"b": 1}', None, 0.0),
        (json_schema({"required": ["a"]}), "{", None, 0.0),
    ],
)
def test_scores_by_hand(scorer: Scorer, output, expected, score):
    assert scorer.grade(output, item(expected)) == pytest.approx(score)


def test_chrf_is_sacrebleus():
    output, expected = "the cat is on the mat", "there is a cat on the mat"
    assert chrf().grade(output, item(expected)) == pytest.approx(sentence_chrf(output, [expected]).score / 100)
    assert chrf().grade(expected, item(expected)) == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_the_longest_common_subsequence_is_the_textbooks(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(a, b) == table[-1][-1]


@pytest.mark.parametrize(
    ("output", "read"),
    [
        ("billing", "billing"),
        ("  Billing.\n", "billing"),
        ('"billing"', "billing"),
        ("**billing**", "billing"),
        ("billing\n\nBecause the customer asks about an invoice", "billing"),
        ("The label is: billing.", "billing"),
        ("billing or technical", None),
        ("rebilling", None),
        ("", None),
    ],
)
def test_reading_a_label(output, read):
    assert LabelReader(["billing", "technical", "other"]).read(output) == read


def test_labels_that_differ_only_in_case_are_read_exactly():
    reader = LabelReader(["us", "US"])
    assert (reader.read("US"), reader.read("us"), reader.read("Us")) == ("US", "us", None)


def test_macro_f1_is_scikit_learns():
    expected = ["a", "a", "b", "b", "b", "c"]
    answered = ["a", "b", "b", None, "b", "a"]
    rows = [
        Row(str(i), "x", "prompt", 1, "", "stop", {"label": 0.0}, 1, 0.1, expected=e, group=str(i), label=a)
        for i, (e, a) in enumerate(zip(expected, answered, strict=True))
    ]
    labelled = [a or "none" for a in answered]
    theirs = f1_score(expected, labelled, labels=["a", "b", "c"], average="macro", zero_division=0)
    assert macro_f1(rows).mean == pytest.approx(theirs)


def test_auto_scorers_follow_the_answers():
    def names(answers, schema=None):
        rows = [item(answer, f"question {i}") for i, answer in enumerate(answers)]
        return [scorer.name for scorer in choose_scorers("auto", detect_task(rows, schema))]

    assert names(['{"a": 1}', '{"b": 2}'])[:3] == ["json_fields", "json_exact", "json_valid"]
    assert "json_schema" in names(['{"a": 1}', '{"b": 2}'], {"type": "object"})
    assert names(["yes", "no"] * 10)[0] == "label"
    assert names([f"answer {i}" for i in range(20)])[0] == "exact_match"
    assert names([f"a much longer answer to the question number {i}" for i in range(20)])[0] == "chrf"


def test_a_task_knows_its_keys_and_whether_values_are_copied():
    rows = [item(json.dumps({"name": "Ann"} | ({"zip": "12"} if i else {})), "Ann lives in 12") for i in range(3)]
    task = detect_task(rows)
    assert (task.kind, task.keys, task.always, task.copied) == ("json", ("name", "zip"), ("name",), True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["exakt_match"], 'did you mean "exact_match"?'),
        (["regex"], "{regex: PATTERN}"),
        ([{"regex": "("}], "not a regular expression"),
        (["judge"], "{judge:"),
        (["json_schema"], "data.schema"),
        (["label"], "no label set"),
        ([{"type": "python", "name": "x", "source": "import os"}], "never run from data"),
        ([{"type": "nothing"}], "no scorer"),
        (["chrf", "chrf"], "two scorers"),
    ],
)
def test_scorers_that_cannot_be_had_are_a_sentence(given, said):
    with pytest.raises(InputError) as error:
        choose_scorers(given, detect_task([item(f"a much longer answer {i} of its own kind") for i in range(9)]))
    assert said in str(error.value)


def test_a_bad_schema_is_a_sentence_and_a_reference_is_never_fetched():
    with pytest.raises(InputError, match="not a valid JSON Schema"):
        json_schema({"type": 7})
    scored = score_answer([json_schema({"$ref": "http://127.0.0.1:9/schema.json"})], "{}", item(None))
    assert scored.scores["json_schema"] == 0.0
    assert "json_schema" in scored.faults


def test_faults_are_counted_and_never_dropped():
    def raises(output, row):
        raise RuntimeError("boom")

    scorers = [
        Scorer("raises", "", raises),
        Scorer("nan", "", lambda output, row: float("nan")),
        Scorer("big", "", lambda output, row: 7.0),
        exact_match(),
    ]
    scored = score_answer(scorers, "x", item("x"))
    assert scored.scores == {"raises": 0.0, "nan": 0.0, "big": 0.0, "exact_match": 1.0}
    assert scored.faults.keys() == {"raises", "nan", "big"}
    assert score_answer(scorers, "x", item(None)).scores == dict.fromkeys(scored.scores)
    assert score_answer([exact_match(), json_valid()], "", item(""), failed="gone").scores == {
        "exact_match": 0.0,
        "json_valid": 0.0,
    }


def test_answers_of_every_size_and_shape_are_scored():
    scorers = [exact_match(), chrf(), rouge_l(), json_valid(), json_fields(), json_exact(), contains()]
    for output in ("", "word " * 20_000, "{" * 100_000, "[" * 100_000, "\x00\ud800".replace("\ud800", "�")):
        scored = score_answer(scorers, output, item('{"a": "word"}'))
        assert all(score is not None and 0 <= score <= 1 for score in scored.scores.values())


def test_json_reading():
    assert find_json('x [1] {"a": 2}') == [1]
    for bad in ("", "{", "nul", '{"a": NaN}', "[" * 100_000):
        with pytest.raises(InvalidJson):
            parse_json(bad)


def test_a_label_scorer_forgives_a_full_stop():
    assert label(["yes", "no"]).grade("Yes.", item("yes")) == 1.0


def test_a_python_grader_comes_from_a_named_file(tmp_path):
    file = tmp_path / "strict.py"
    file.write_text(
        "def grade(sample, item):\n    return sample['output_text'] == item['expected'] and item['tag'] == 'x'\n"
    )
    scorer = python_grader(file)
    assert scorer.name == "strict"
    assert scorer.grade("a", item("a", tag="x")) == 1.0
    assert scorer.grade("a", item("a", tag="y")) == 0.0
    file.write_text("raise OSError('no')")
    with pytest.raises(InputError, match="cannot be loaded"):
        python_grader(file)
    with pytest.raises(InputError, match="there is no such grader"):
        python_grader(tmp_path / "missing.py")
