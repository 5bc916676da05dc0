"""Rows of every format become one Example; a row that can't is named with its line and what to do."""

from __future__ import annotations

import json

import pytest
from data_rows import chat, examples_of, recipe_data, write_jsonl

from tunesmith.data import formats
from tunesmith.data.formats import read_examples, read_held_out
from tunesmith.data.parts import answer_text, input_text
from tunesmith.errors import InputError
from tunesmith.recipe import Data

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}],
}


def one(tmp_path, row, **keys):
    return examples_of(tmp_path, [row], **keys)[0]


def test_openai_chat_rows(tmp_path):
    row = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello", "weight": 0},
            *chat("q", "a")["messages"],
        ],
        "tools": TOOLS,
        "parallel_tool_calls": False,
    }
    example = one(tmp_path, row)
    assert example.kind == "chat"
    assert example.messages[1]["weight"] == 0
    assert example.tools == tuple(TOOLS)
    assert example.columns == {"parallel_tool_calls": False}


def test_a_tool_call_counts_as_an_answer_and_its_arguments_become_text(tmp_path):
    example = one(tmp_path, {"messages": [{"role": "user", "content": "1+1?"}, CALL], "tools": TOOLS})
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert json.loads(answer_text(example)) == [{"name": "add", "arguments": {"a": 1}}]


def test_text_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}]}
    assert one(tmp_path, row).messages[0]["content"] == "two parts"


def test_input_output(tmp_path):
    example = one(tmp_path, {"input": "in", "output": {"city": "Köln"}, "topic": "x"})
    assert [m["role"] for m in example.messages] == ["user", "assistant"]
    assert answer_text(example) == '{"city": "Köln"}'
    assert example.columns == {"topic": "x"}


def test_prompt_completion_of_strings_stays_plain(tmp_path):
    example = one(tmp_path, {"prompt": "Once", "completion": " upon"}, system="ignored for plain text")
    assert (example.kind, example.prompt, example.completion, example.messages) == ("completion", "Once", " upon", ())


def test_prompt_completion_of_turns_trains_the_completion_only(tmp_path):
    turns = chat("a", "b", "c", "d")["messages"]
    example = one(tmp_path, {"prompt": turns[:3], "completion": turns[3:]})
    assert [m.get("weight") for m in example.messages] == [None, 0, None, None]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": chat("q", "good")["messages"],
            "rejected": chat("q", "bad")["messages"],
        },
        {"chosen": chat("q", "good")["messages"], "rejected": chat("q", "bad")["messages"]},
        {
            "input": {"messages": [{"role": "user", "content": "q"}]},
            "preferred_output": [{"role": "assistant", "content": "good"}],
            "non_preferred_output": [{"role": "assistant", "content": "bad"}],
        },
    ],
)
def test_preference_in_its_spellings(tmp_path, row):
    example = one(tmp_path, row)
    contents = [[m["content"] for m in turns] for turns in (example.messages, example.chosen, example.rejected)]
    assert (example.kind, contents) == ("preference", [["q"], ["good"], ["bad"]])


def test_text(tmp_path):
    assert one(tmp_path, {"text": "a story"}).text == "a story"


def test_system_is_given_to_rows_that_carry_none(tmp_path):
    own = {"messages": [{"role": "system", "content": "own"}, *chat("q", "a")["messages"]]}
    examples = examples_of(tmp_path, [own, chat("q", "a")], system="given")
    assert [example.messages[0]["content"] for example in examples] == ["own", "given"]


def test_equal_rows_have_equal_ids_wherever_they_stand(tmp_path):
    a, b, c = examples_of(
        tmp_path, [{"input": "x", "output": "y"}, {"output": "y", "input": "x"}, {"input": "x", "output": "z"}]
    )
    assert a.id == b.id != c.id
    assert (a.source.line, b.source.line) == (1, 2)


def test_auto_says_what_it_found_and_why(tmp_path):
    said: list[str] = []
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    read_examples(recipe_data(path), say=said.append)
    assert said == [f'data format: prompt_completion, because {path} line 1 has "prompt" and "completion"']


def test_tables_may_hold_messages_as_json(tmp_path):
    path = tmp_path / "rows.csv"
    cell = json.dumps(chat("q", "a")["messages"]).replace('"', '""')
    path.write_text(f'messages,topic\n"{cell}",x\n')
    example = read_examples(recipe_data(str(path)))[0]
    assert (input_text(example), answer_text(example), example.columns) == ("q", "a", {"topic": "x"})


def test_weights_repeat_and_sample_by_content(tmp_path):
    rows = [{"input": f"question {i}", "output": "a"} for i in range(400)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    def ids(weight, of=path):
        return [
            example.id for example in read_examples(Data.model_validate({"train": [{"path": of, "weight": weight}]}))
        ]

    whole, half, more = ids(1), ids(0.5), ids(2.5)
    assert 160 < len(half) < 240
    assert set(half) < set(whole)
    assert sorted(more) == sorted(whole * 2 + half)
    assert set(ids(0.25)) < set(half)
    # The same rows are taken whatever stands around them.
    reversed_path = write_jsonl(tmp_path / "reversed.jsonl", rows[::-1])
    assert set(ids(0.5, reversed_path)) == set(half)


def test_files_are_read_in_order_and_must_agree(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"input": "1", "output": "x"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": "2"}])
    with pytest.raises(InputError) as error:
        read_examples(Data.model_validate({"train": [{"path": a}, {"path": b}]}))
    assert str(error.value).startswith(f"{b} line 1: the row has format text")
    assert f"{a} line 1 has format input_output" in str(error.value)


@pytest.mark.parametrize(
    ("row", "rule", "what"),
    [
        ({"input": "x"}, "no-answer", 'no "output"'),
        ({"input": "x", "output": None}, "no-answer", 'no "output"'),
        ({"input": "x", "output": "  "}, "empty-answer", "empty"),
        (chat("only asked"), "no-answer", 'role "user"; a training row must end with "assistant"'),
        (chat("q", ""), "empty-answer", "empty"),
        ({"messages": []}, "bad-message", "at least one message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown-role", 'unknown role "robot"'),
        ({"messages": [{"role": "human", "content": "x"}]}, "unknown-role", 'did you mean "user"'),
        ({"messages": [{"from": "human", "value": "x"}]}, "unknown-role", "ShareGPT"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "bad-message", "not text"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "bad-message", "no content"),
        ({"messages": ["x"]}, "bad-message", "message 1"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 2}]}, "bad-message", "weight"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "bad-tool-call", "tool call"),
        ({**chat("q", "a"), "tools": [{"nope": 1}]}, "bad-tools", '"tools"'),
        ({"conversations": []}, "unknown-format", "ShareGPT"),
        ({"instruction": "do", "input": "x", "output": "y"}, "unknown-format", "Alpaca"),
        ({"question": "x", "answer": "y"}, "unknown-format", '"question", "answer"'),
        ({"prompt": "x", "completion": ""}, "empty-answer", "completion is empty"),
        ({"text": " "}, "empty-answer", "text is empty"),
        ({"prompt": "x", "chosen": "y", "rejected": ""}, "empty-answer", '"rejected"'),
        ({"input": "\ud83d", "output": "y"}, "bad-encoding", "surrogate"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, rule, what):
    line = json.dumps(row)
    path = write_jsonl(tmp_path / "rows.jsonl", [line])
    with pytest.raises(InputError) as error:
        read_examples(recipe_data(path))
    assert str(error.value).startswith(f"{path} line 1: ")
    assert what in str(error.value)
    faults = []
    assert not read_examples(recipe_data(path), faults=faults)
    assert [(fault.rule, fault.severity, fault.lines) for fault in faults] == [(rule, "block", (1,))]


def test_mixed_formats_name_both_lines(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("q", "a"), {"input": "x", "output": "y"}])
    with pytest.raises(InputError) as error:
        read_examples(recipe_data(path))
    assert "line 2: the row has format input_output" in str(error.value)
    assert "line 1 has format messages" in str(error.value)


def test_an_explicit_format_reads_only_that(tmp_path):
    row = {"input": "a", "output": "b", "text": "c", "instruction": "d"}
    assert one(tmp_path, row, format="text").text == "c"
    assert input_text(one(tmp_path, row, format="input_output")) == "a"
    with pytest.raises(InputError, match='no "messages"'):
        one(tmp_path, row, format="messages")


def test_held_out_files(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"input": "a", "output": "b"}])
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"input": "c", "output": "d"}])
    rows = read_held_out(recipe_data(train, held_out=held_out))
    assert rows is not None
    assert [input_text(row) for row in rows] == ["c"]
    assert read_held_out(recipe_data(train, held_out=0.2)) is None


def test_a_file_larger_than_the_disk_is_refused_at_once(tmp_path, monkeypatch):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.truncate(5 * 2**30)
    monkeypatch.setattr(formats, "free_bytes", lambda folder: 4 * 2**30)
    with pytest.raises(InputError, match=r"the disk has no room .* TMPDIR"):
        read_examples(recipe_data(str(path)))


def test_a_file_of_blank_lines_holds_no_rows(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ["", "  "])
    with pytest.raises(InputError, match="no rows"):
        read_examples(recipe_data(path))


def test_rows_for_a_teacher_may_leave_the_answer_out(tmp_path):
    """Alone or among rows that have one, as a text or as turns; without a teacher they are refused as before."""
    rows = [{"input": "q1", "group": 1}, {"input": "q2", "output": "a2"}, chat("q3", "a3", "q4"), chat("q5", "a5")]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows[:2]])
    first, second = read_examples(recipe_data(path, system="s"), inputs=True)
    assert (first.kind, second.kind) == ("input", "chat")
    assert [turn["role"] for turn in first.messages] == ["system", "user"]
    assert (input_text(first), answer_text(first), first.columns) == ("q1", "", {"group": 1})
    turns, whole = read_examples(recipe_data(write_jsonl(tmp_path / "turns.jsonl", rows[2:])), inputs=True)
    assert (turns.kind, whole.kind) == ("input", "chat")
    assert [turn["content"] for turn in turns.messages] == ["q3", "a3", "q4"]
    for refused, said in (({"input": " "}, "line 1: the row asks nothing"), (chat(""), "line 1: the row asks nothing")):
        with pytest.raises(InputError, match=said):
            read_examples(recipe_data(write_jsonl(tmp_path / "bad.jsonl", [refused])), inputs=True)
    with pytest.raises(InputError, match=r'line 1: .*"output"'):
        read_examples(recipe_data(path))


def test_the_gate_takes_rows_without_answers_as_they_are(tmp_path):
    from tunesmith.data.checks import gate

    (tmp_path / "schema.json").write_text('{"type": "object"}')
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input": f"what is {i} times {i + 3}?"} for i in range(60)])
    report = gate(recipe_data(path, schema=str(tmp_path / "schema.json")), inputs=True)
    assert not report.blocked, report.summary()
    assert not {finding.rule for finding in report.findings} & {"schema-invalid", "same-answer", "json-drift"}
