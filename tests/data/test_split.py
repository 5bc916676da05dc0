"""A split you can trust: no leaks by construction, stable by content, labels on both sides."""

from __future__ import annotations

import random

import pytest
from data_rows import chat, examples_of, varied

from tunesmith.data.items import items
from tunesmith.data.likeness import likeness
from tunesmith.data.parts import labels
from tunesmith.data.split import split
from tunesmith.errors import InputError

PAIRS = [
    (f"How do I fix the {thing}?", f"Turn the {thing} off and on again.")
    for thing in ["screen", "mouse", "keyboard", "laptop", "router", "modem", "phone", "printer", "disk", "camera"]
]


def ids(rows):
    return [row.id for row in rows]


def test_sizes_and_order(tmp_path):
    rows = examples_of(tmp_path, varied(600))
    parts = split(rows, 0.2)
    assert 0.2 * 600 - 3 * 9.8 <= len(parts.held_out) <= 0.2 * 600 + 3 * 9.8  # three standard deviations
    assert len(parts.train) + len(parts.held_out) == 600
    for side in (parts.train, parts.held_out):
        assert [row.source.line for row in side] == sorted(row.source.line for row in side)
    assert split(rows, 0.2).hash == parts.hash != split(rows, 0.3).hash


def test_nothing_is_held_out_at_zero(tmp_path):
    parts = split(examples_of(tmp_path, varied(20)), 0)
    assert (len(parts.train), len(parts.held_out)) == (20, 0)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 40])
def test_small_data_sets_have_both_sides(tmp_path, count):
    parts = split(examples_of(tmp_path, varied(count)), 0.15)
    assert 1 <= len(parts.held_out) <= max(1, count // 2)
    assert parts.train


def test_adding_rows_leaves_the_others_where_they_are(tmp_path):
    rows = varied(500)
    few = split(examples_of(tmp_path, rows[:350]), 0.2)
    shuffled = rows[350:] + rows[:350]
    random.Random(0).shuffle(shuffled)
    more = split(examples_of(tmp_path, shuffled), 0.2)
    assert set(ids(few.held_out)) < set(ids(more.held_out))
    assert set(ids(few.train)) < set(ids(more.train))


def test_ten_pairs_in_a_thousand_rows_do_not_leak(tmp_path):
    """The shape of chatterbot-corpus 1.3.3, tech_support.yml."""
    rows = [{"input": question, "output": answer} for question, answer in PAIRS] * 105
    random.Random(0).shuffle(rows)
    parts = split(examples_of(tmp_path, rows), 0.15)
    assert not set(ids(parts.train)) & set(ids(parts.held_out))
    assert len(parts.held_out) in (105, 210, 315)


def test_near_duplicates_stay_on_one_side(tmp_path):
    rows = [row for row in varied(300) for _ in range(2)]
    for row in range(1, 600, 2):
        rows[row] = {**rows[row], "input": rows[row]["input"].replace("then", "and afterwards").upper()}
    examples = examples_of(tmp_path, rows)
    parts = split(examples, 0.3)
    near = dict(zip(ids(examples), likeness(examples).near.tolist(), strict=True))
    assert not {near[id] for id in ids(parts.train)} & {near[id] for id in ids(parts.held_out)}
    held = {row.source.line for row in parts.held_out}
    assert all((line % 2 == 0 and line - 1 in held) or (line % 2 == 1 and line + 1 in held) for line in held)


def test_groups_stay_on_one_side_and_keep_it_as_they_grow(tmp_path):
    rows = [{**row, "customer": f"c{i % 40}"} for i, row in enumerate(varied(400))]
    parts = split(examples_of(tmp_path, rows), 0.25, "customer")
    sides = [{row.columns["customer"] for row in side} for side in (parts.train, parts.held_out)]
    assert not sides[0] & sides[1]
    assert 0.25 * 400 / 2 <= len(parts.held_out) <= 0.25 * 400 * 1.7
    grown = [{**row, "customer": f"c{i % 40}"} for i, row in enumerate(varied(480))]
    again = split(examples_of(tmp_path, grown), 0.25, "customer")
    assert {row.columns["customer"] for row in again.held_out} == sides[1]


def test_a_group_column_must_be_there(tmp_path):
    rows = [{**varied(1)[0], "customer": 1}, *varied(3)]
    with pytest.raises(InputError, match='line 2: the row has no column "customer"'):
        split(examples_of(tmp_path, rows), 0.2, "customer")


def test_labels_are_on_both_sides_in_proportion(tmp_path):
    names = ["billing"] * 12 + ["delivery"] * 6 + ["other"] * 2
    rows = examples_of(tmp_path, varied(800, lambda i: names[i * 7 % 20]))
    parts = split(rows, 0.2)
    for name, share in (("billing", 0.6), ("delivery", 0.3), ("other", 0.1)):
        for side in (parts.train, parts.held_out):
            found = (labels(rows) and sum(row.messages[-1]["content"] == name for row in side)) / len(side)
            assert abs(found - share) < 0.08


def test_every_label_that_can_be_is_held_out(tmp_path):
    rows = examples_of(tmp_path, varied(240, lambda i: f"label {i % 24}"))  # ten rows a label
    parts = split(rows, 0.15)
    assert {row.messages[-1]["content"] for row in parts.held_out} == {f"label {i}" for i in range(24)}
    assert {row.messages[-1]["content"] for row in parts.train} == {f"label {i}" for i in range(24)}


def test_one_large_cluster_is_trained_on(tmp_path):
    same = [
        {"input": "The very same long question about the kettle and the violin", "output": str(i)} for i in range(60)
    ]
    parts = split(examples_of(tmp_path, same + varied(60)), 0.1)
    assert all(row.source.line > 60 for row in parts.held_out)
    assert 1 <= len(parts.held_out) <= 30


def test_rows_that_are_all_alike_cannot_be_held_out(tmp_path):
    rows = [{"input": "The very same long question about the kettle", "output": str(i)} for i in range(30)]
    assert not split(examples_of(tmp_path, rows), 0.2).held_out


def test_copies_made_by_a_weight_are_held_out_once(tmp_path):
    rows = examples_of(tmp_path, varied(100))
    parts = split([row for row in rows for _ in range(3)], 0.2)
    assert len(parts.held_out) == len(set(ids(parts.held_out)))
    assert len(parts.train) == 3 * len(set(ids(parts.train)))
    assert set(ids(parts.held_out)) == set(ids(split(rows, 0.2).held_out))


def test_given_held_out_rows_are_taken_as_they_are(tmp_path):
    rows = examples_of(tmp_path, varied(20))
    parts = split(rows[:15], rows[10:])
    assert (ids(parts.train), ids(parts.held_out), parts.supplied) == (ids(rows[:15]), ids(rows[10:]), True)


def test_items_of_every_kind(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    rows = [
        chat("a", "b", "c", "d", topic="x"),
        chat("a", "b", "c", "d", topic="x"),
        {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "tool_calls": [call]}]},
    ]
    first, copy, tool = items(examples_of(tmp_path, rows))
    assert [m["content"] for m in first.messages] == ["a", "b", "c"]
    assert (first.expected, first.columns, first.prompt) == ("d", {"topic": "x"}, None)
    assert copy.id == f"{first.id}-2"
    assert tool.expected == '[{"name": "add", "arguments": {"a": 1}}]'
    (plain,) = items(examples_of(tmp_path, [{"prompt": "p", "completion": "c"}]))
    assert (plain.prompt, plain.expected, plain.messages) == ("p", "c", ())
    (pair,) = items(examples_of(tmp_path, [{"prompt": "p", "chosen": "c", "rejected": "r"}]))
    assert (pair.messages[0]["content"], pair.expected) == ("p", "c")
    assert items(examples_of(tmp_path, [{"text": "nothing is asked"}])) == []
