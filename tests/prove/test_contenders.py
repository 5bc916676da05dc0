"""What every contender is asked: honest prompts, the tuned one exactly as trained, nothing longer than the context."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fakes import FakeEngine, FakeRenderer, chat_row
from tunesmith.data.items import items
from tunesmith.errors import InputError
from tunesmith.prove.answering import ReplyCache, Weights
from tunesmith.prove.choice import choose
from tunesmith.prove.contender import Prompted
from tunesmith.prove.contenders import Bench, contender_names, earlier_names
from tunesmith.prove.key_order import decoding_schema
from tunesmith.prove.retrieval import Index, cut, read_knowledge
from tunesmith.prove.scoring import choose_scorers
from tunesmith.prove.shots import fixed_shots, similar_shots
from tunesmith.prove.task import detect_task
from tunesmith.prove.wordings import Page, Wording, wordings
from tunesmith.recipe import Prove
from tunesmith.types import Example, Item, Source

COLOURS = ["red", "green", "blue"]


def label_rows(n=30):
    return items([chat_row(i, f"the {COLOURS[i % 3]} thing number {i}", COLOURS[i % 3]) for i in range(n)])


def json_rows(n=30):
    rows = []
    for i in range(n):
        answer = {"name": f"N{i}"} | ({"zip": f"{i}"} if i % 2 else {}) | ({"rare": "yes"} if i == 7 else {})
        rows.append(chat_row(i, f"N{i} {i} yes", json.dumps(answer)))
    return items(rows)


def bench(rows, engine=None, schema=None, context_length=100_000, prove=None, **tuned):
    engine = engine or FakeEngine(lambda adapter, question, request: "red")
    engine.context_length = context_length
    task = detect_task(rows, schema)
    return Bench(
        base=Weights(engine),
        tuned={name: Weights(engine, name) for name in tuned or {"tuned": 1}},
        train=rows,
        task=task,
        prove=prove or Prove(),
        scorer=choose_scorers("auto", task)[0],
        cache=ReplyCache(None),
        max_tokens=16,
    )


def written(contender, item):
    assert isinstance(contender, Prompted)
    return contender.write(item)


def test_the_tuned_contender_is_asked_exactly_what_was_trained():
    rows = label_rows()
    for item in rows[:3]:
        prompt = written(bench(rows).build("tuned"), item)
        assert prompt.messages == item.messages
    completion = Item("c", Source("f", 1), prompt="Q: x\nA:", expected=" red")
    assert written(bench(rows).build("tuned"), completion).text == "Q: x\nA:"


def test_prompts_name_every_label_and_key_and_the_schema():
    rows, schema = json_rows(), {"type": "object", "required": ["name"]}
    for wording in wordings(detect_task(label_rows())):
        assert all(colour in wording.text for colour in COLOURS)
    for wording in (*wordings(detect_task(rows)), *wordings(detect_task(rows, schema))[1:]):
        assert all(key in wording.text for key in ("name", "zip", "rare"))
        assert "word for word" in wording.text
    assert json.dumps(schema, separators=(",", ":")) in wordings(detect_task(rows, schema))[0].text


def test_a_systems_words_are_kept_and_a_template_without_system_turns_is_served():
    item = Item("s", Source("f", 1), ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q"}))
    wording = Wording("w", "Say a colour.")
    assert Page(True).write(item, wording).messages[0] == {"role": "system", "content": "Be kind.\n\nSay a colour."}
    merged = Page(True, accepts_system=False).write(item, wording).messages
    assert [turn["role"] for turn in merged] == ["user"]
    assert merged[0]["content"] == "Be kind.\n\nSay a colour.\n\nQ"
    after = Page(True).write(item, replace(wording, after_question=True)).messages
    assert [turn["content"] for turn in after] == ["Be kind.", "Q\n\nSay a colour."]


def test_a_template_that_refuses_system_turns_is_noticed():
    class NoSystem(FakeRenderer):
        def prompt_ids(self, messages, tools=()):
            if messages[0]["role"] == "system":
                raise InputError("System role not supported")
            return super().prompt_ids(messages, tools)

    engine = FakeEngine(lambda adapter, question, request: "red")
    engine.renderer = NoSystem()
    prompt = written(bench(label_rows(), engine).build("prompt"), label_rows()[0])
    assert prompt.messages[0]["role"] == "user"


def test_a_base_without_turns_is_prompted_in_plain_text():
    rows = items(
        [
            Example(f"{i:x}", Source("f", i), "completion", prompt=f"Q{i}:", completion=f" {COLOURS[i % 3]}")
            for i in range(30)
        ]
    )
    prompt = Page(has_template=False).write(
        rows[0], wordings(detect_task(rows))[0], fixed_shots(rows, 2, detect_task(rows))(rows[0])
    )
    assert prompt.text is not None
    assert prompt.text.startswith("Classify")
    assert prompt.text.endswith("\n\nQ0:")
    assert prompt.text.count("Q") == 3


def test_few_shot_shows_training_rows_and_never_the_item_itself():
    rows = label_rows()
    contender = bench(rows, prove=Prove(few_shot=4)).build("few_shot")
    held_out = items([chat_row(99, "the red thing number 99", "red")])[0]
    turns = written(contender, held_out).messages
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert len(answers) == 4
    assert set(answers) <= set(COLOURS)
    shots = similar_shots(rows, 4)
    assert all(shot.question != rows[5].messages[0]["content"] for shot in shots(rows[5]))
    assert shots(held_out)[-1].answer == "red"


def test_fixed_shots_cover_labels_and_keys():
    assert {shot.answer for shot in fixed_shots(label_rows(), 3, detect_task(label_rows()))(label_rows()[0])} == set(
        COLOURS
    )
    rows = json_rows()
    shown = fixed_shots(rows, 2, detect_task(rows))(rows[0])
    assert {key for shot in shown for key in json.loads(shot.answer)} == {"name", "zip", "rare"}
    assert fixed_shots([], 3, detect_task(rows))(rows[0]) == []


def test_examples_and_passages_are_dropped_until_the_prompt_fits():
    rows = label_rows()
    roomy, tight = bench(rows), bench(rows, context_length=330)
    for name in ("few_shot", "retrieval", "tuned+retrieval"):
        full = len(roomy.model(roomy.base).prompt_ids(written(roomy.build(name), rows[0])))
        less = len(tight.model(tight.base).prompt_ids(written(tight.build(name), rows[0])))
        assert less + 16 <= 330
        assert less < full or full + 16 <= 330


def test_a_prompt_that_can_never_fit_fails_alone():
    rows = label_rows()
    long = items([chat_row(50, "word " * 500, "red")])[0]
    contender = bench(rows, context_length=1000).build("tuned")
    replies = contender.answer([rows[0], long, rows[1]], ReplyCache(None))
    assert [reply.error is None for reply in replies] == [True, False, True]
    assert "the base takes 1000" in (replies[1].error or "")


def test_retrieval_reads_knowledge_or_solved_rows(tmp_path):
    rows = label_rows()
    (tmp_path / "a.md").write_text("Kangaroos live in Australia.\n\nPenguins live in the Antarctic.")
    (tmp_path / "b.txt").write_text("Nothing of interest.")
    prove = Prove(knowledge=str(tmp_path))
    asked = items([chat_row(9, "Where do penguins live?", "red")])[0]
    prompt = written(bench(rows, prove=prove).build("retrieval"), asked)
    assert "Penguins live in the Antarctic." in (prompt.messages[-1].get("content") or "")
    solved = written(bench(rows).build("retrieval"), label_rows()[4])
    assert "Answer: " in (solved.messages[-1].get("content") or "")


def test_knowledge_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_knowledge(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no text"):
        read_knowledge(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="not UTF-8"):
        read_knowledge(tmp_path)


def test_passages_are_cut_at_paragraphs():
    text = "\n\n".join("word " * n for n in (50, 50, 50, 300))
    assert [len(part.split()) for part in cut(text)] == [100, 50, 120, 120, 60]


def test_an_index_is_deterministic_and_survives_strange_queries():
    index = Index(["red apple", "green pear", "red cherry"])
    assert index.nearest("red", 2) == [0, 2]
    assert index.nearest("red", 2, without=0)[0] == 2
    assert index.nearest("zzz ...", 2) == [0, 1]
    assert Index(["...", ""]).nearest("x", 1) == [0]


def test_constrained_variants_decode_under_the_schema():
    schema = {"type": "object"}
    rows = json_rows()
    assert contender_names(Prove(), detect_task(rows, schema))[-2:] == ["prompt+schema", "tuned+schema"]
    engine = FakeEngine(lambda adapter, question, request: "{}")
    contender = bench(rows, engine, schema=schema).build("tuned+schema")
    contender.answer(rows[:1], ReplyCache(None))
    assert engine.asked[-1].schema == schema
    assert engine.asked[-1].adapter == "tuned"


def test_label_tasks_get_the_classifier():
    rows = label_rows(60)
    assert contender_names(Prove(), detect_task(rows))[-1] == "tfidf"
    replies = bench(rows).build("tfidf").answer(rows[:9], ReplyCache(None))
    assert [reply.output for reply in replies] == [row.expected for row in rows[:9]]
    assert contender_names(Prove(contenders=("prompt",)), detect_task(rows)) == ["prompt"]


def test_earlier_runs_answer_under_their_own_name():
    engine = FakeEngine(lambda adapter, question, request: adapter or "base")
    contender = bench(label_rows(), engine, **{"tuned": 1, "runs/old": 1}).build("runs/old")
    assert contender.kind == "previous"
    names = ("prompt", "tuned+schema", "runs/old", "runs/old+schema", "m@http://x/v1")
    assert earlier_names(Prove(contenders=names)) == ["runs/old"]
    assert contender.answer(label_rows()[:1], ReplyCache(None))[0].output == "runs/old"


@pytest.mark.parametrize("name", ["promt", "runs/nowhere", "tuned+schema", "few_shot+retrieval", "schema"])
def test_unknown_contenders_are_a_sentence(name):
    with pytest.raises(InputError):
        bench(label_rows()).build(name)


def test_the_better_wording_is_chosen_on_training_rows_and_told():
    def script(adapter, question, request):
        return question.split()[1] if "fits the text" in question else "red"

    built = bench(label_rows(60), FakeEngine(script))
    built.build("prompt")
    choice = built.choices[0]
    assert choice.chosen == "question, last"
    assert {name: n for name, _, n in choice.tried} == {"list": 8, "list, last": 8, "question, last": 8}


def test_equal_variants_are_not_tried_further():
    rows = label_rows(60)
    built = bench(rows, FakeEngine(lambda adapter, question, request: "nothing"))
    variants = [(name, built.build("tuned")) for name in ("one", "two")]
    choice = choose("x", variants, rows[:24], built.scorer, ReplyCache(None))
    assert choice.chosen == "one"
    assert [n for _, _, n in choice.tried] == [8, 8]


def test_constrained_decoding_does_not_fight_the_order_of_keys():
    schema = {
        "type": "object",
        "properties": {"a.b": {"type": "string"}, "c": {"type": "object", "properties": {"d": {}, "e": {}}}},
        "required": ["c"],
        "additionalProperties": False,
    }
    assert decoding_schema(schema, ['{"a.b": "x", "c": {"d": 1, "e": 2}}', '{"c": {}}', "no JSON"]) == schema
    for answer in ('{"c": {}, "a.b": "x"}', '{"c": {"e": 1, "d": 2}}'):
        assert decoding_schema(schema, [answer]) == {
            "type": "object",
            "patternProperties": {
                r"^a\.b$": {"type": "string"},
                "^c$": {"type": "object", "patternProperties": {"^d$": {}, "^e$": {}}},
            },
            "additionalProperties": False,
        }
