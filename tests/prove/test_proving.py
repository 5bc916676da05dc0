"""Whole proofs with a scripted engine: planted winners, faults that are counted, a kill that costs nothing."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from contract import ITEM_FIELDS
from fakes import FakeEngine, chat_row
from tunesmith.data.lazy import evenly
from tunesmith.errors import InputError
from tunesmith.pipeline import compare
from tunesmith.prove.answering import Weights
from tunesmith.prove.compare import compare_reports
from tunesmith.prove.compare_page import render_comparison
from tunesmith.prove.proving import Options, Voices, prove_items
from tunesmith.prove.report import report_from_items
from tunesmith.prove.rows import read_rows
from tunesmith.prove.sample import score_sample
from tunesmith.prove.scorers import exact_match
from tunesmith.recipe import Data, Prove, Recipe
from tunesmith.store.runs import Run

CITIES = ["Rome", "Oslo", "Lima", "Cairo"]


def rows(n, first=0):
    made = []
    for i in range(first, first + n):
        city = CITIES[i * 7 % 4]
        question = f"Person {i} lives in {city} {1000 + i}"
        made.append(
            chat_row(i, question, json.dumps({"city": city, "zip": str(1000 + i)}), lang="en" if i % 2 else "de")
        )
    return made


TRAIN, HELD_OUT = rows(120), rows(120, first=500)
EXPECTED = {row.messages[0]["content"]: row.messages[1]["content"] for row in TRAIN + HELD_OUT}


def engine(right):
    """`right[contender]` is the share of items it answers rightly; contenders are told apart by their prompts."""

    def script(adapter, question, request):
        asked = question.split("\n\n")[-1 if "Context" in question else 0]
        if asked not in EXPECTED:
            return "A general answer."
        turns = len(request.messages)
        if adapter:
            who = "tuned"
        elif "Context" in question:
            who = "retrieval"
        else:
            who = "few_shot" if turns > 4 else "prompt"
        lucky = random.Random(f"{who} {asked}").random() < right.get(who, 0.0)
        answer = json.loads(EXPECTED[asked])
        return json.dumps(answer if lucky else {**answer, "city": "Nowhere"})

    return FakeEngine(script, {None: 1.0, "tuned": 1.1})


def prove(
    folder, right=None, held_out=HELD_OUT, fake=None, surprise=None, prove=None, data=None, hashes=True, **options
):
    fake = fake or engine(right or {})
    if surprise is not None:
        fake.surprise["tuned"] = surprise
    recipe = Recipe(data=Data(train="x.jsonl", **(data or {})), prove=prove or Prove(contenders=CONTENDERS))
    folder.mkdir(exist_ok=True)
    voices = Voices(
        Weights(fake, None, "base" if hashes else None),
        {"tuned": Weights(fake, "tuned", "tuned" if hashes else None)},
    )
    return prove_items(held_out, TRAIN, recipe, voices, folder, Options(**options))


CONTENDERS = ("prompt", "few_shot", "retrieval", "tuned")


@pytest.mark.parametrize(
    ("right", "decision", "winner"),
    [
        ({"prompt": 0.3, "few_shot": 0.5, "tuned": 0.95}, "ship", "tuned"),
        ({"prompt": 0.3, "few_shot": 0.95, "tuned": 0.5}, "prompt", "few_shot"),
        ({"prompt": 0.3, "few_shot": 0.2, "retrieval": 0.95, "tuned": 0.5}, "retrieve", "retrieval"),
    ],
)
def test_planted_winners_are_found(tmp_path, right, decision, winner):
    verdict = prove(tmp_path, right).verdict
    assert (verdict.decision, verdict.winner) == (decision, winner)
    assert winner in verdict.reason


def test_where_nothing_differs_nothing_is_shipped(tmp_path):
    alike = FakeEngine(lambda adapter, question, request: next((EXPECTED[q] for q in EXPECTED if q in question), "x"))
    assert prove(tmp_path / "same", fake=alike).verdict.decision == "prompt"
    noisy = prove(tmp_path / "noise", {"prompt": 0.5, "few_shot": 0.5, "retrieval": 0.5, "tuned": 0.52})
    assert noisy.verdict.decision in {"prompt", "retrieve", "hold"}


def test_too_few_items_are_said_to_be_too_few(tmp_path):
    verdict = prove(tmp_path, {"few_shot": 0.4, "tuned": 0.9}, held_out=HELD_OUT[:12]).verdict
    assert verdict.decision == "too-few-items"
    assert "12 independent held-out items" in verdict.reason


def test_rows_of_few_groups_are_few_items(tmp_path):
    grouped = [chat_row(500 + i, row.messages[0]["content"], row.messages[1]["content"], customer=f"c{i % 10}")
               for i, row in enumerate(HELD_OUT)]  # fmt: skip
    report = prove(tmp_path, {"few_shot": 0.4, "tuned": 0.9}, held_out=grouped, data={"group_by": "customer"})
    assert report.verdict.decision == "too-few-items"
    assert "10 independent" in report.verdict.reason


def test_a_model_that_lost_its_general_behaviour_is_held(tmp_path):
    report = prove(tmp_path, {"few_shot": 0.4, "tuned": 0.95}, surprise=9.0)
    assert report.verdict.decision == "hold"
    assert "general behaviour was lost" in report.verdict.reason
    assert report.retention is not None
    assert report.retention["kept"] is False


def test_thoughts_before_an_answer_are_not_scored(tmp_path):
    """Neither a base's own nor those that rows were written with; the answer's length counts them."""
    plain = engine({"prompt": 0.4, "few_shot": 0.4, "retrieval": 0.4, "tuned": 0.9})
    thinks = FakeEngine(lambda *asked: f"<think>{{no}}</think>\n{plain.script(*asked)}")
    report = prove(tmp_path / "a", fake=thinks, prove=Prove(contenders=CONTENDERS, max_new_tokens=99))
    assert report.result("tuned").scores["json_fields"].mean > 0.85
    thoughtful = [
        chat_row(i, row.messages[0]["content"], f"<think>{'so ' * 50}</think>{row.messages[1]['content']}")
        for i, row in enumerate(HELD_OUT)
    ]
    report = prove(tmp_path / "b", held_out=thoughtful, fake=plain)
    assert report.result("tuned").scores["json_fields"].mean > 0.85


def test_where_nobody_does_the_job_that_is_the_verdict(tmp_path):
    fake = FakeEngine(lambda adapter, question, request: "I do not know.")
    assert prove(tmp_path, fake=fake).verdict.decision == "hold"


def test_everything_comes_from_items_jsonl_to_the_last_digit(tmp_path):
    report = prove(tmp_path, {"few_shot": 0.4, "tuned": 0.9}, training_seconds=60.0)
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    (alone / "items.jsonl").write_bytes((tmp_path / "items.jsonl").read_bytes())
    again = report_from_items(alone / "items.jsonl").to_json()
    assert json.dumps(again) == json.dumps(report.to_json())
    assert json.dumps(again) == json.dumps(json.loads((tmp_path / "report.json").read_text()))


def test_the_report_has_the_contracts_shape(tmp_path):
    report = prove(tmp_path, {"few_shot": 0.4, "tuned": 0.9}).to_json()
    assert report["scorer"] == "json_fields"
    assert [each["name"] for each in report["contenders"]] == list(CONTENDERS)
    for each in report["contenders"]:
        assert each.keys() >= {
            "name",
            "scores",
            "prompt_tokens_mean",
            "output_tokens_mean",
            "seconds_per_item",
            "cost_per_1k",
        }
        assert each["scores"].keys() >= {"json_fields", "json_exact", "json_valid", "exact_match"}
        for score in each["scores"].values():
            low, high = score["ci"]
            assert 0 <= low <= score["mean"] <= high <= 1
    pair = next(pair for pair in report["paired"] if (pair["a"], pair["b"]) == ("tuned", "few_shot"))
    assert pair["ci"][0] < pair["diff"] < pair["ci"][1]
    assert 0 <= pair["p"] <= pair["p_holm"] <= 1
    assert report["verdict"].keys() == {"decision", "reason", "winner"}
    assert report["minimum_detectable_effect"] > 0
    assert {each["slice"] for each in report["slices"]} >= {"lang"}
    assert report["retention"]["kept"] is True
    rows, _ = read_rows(tmp_path / "items.jsonl")
    first = json.loads((tmp_path / "items.jsonl").read_text().split("\n")[1])
    assert first.keys() >= ITEM_FIELDS
    tuned = [row for row in rows if row.contender == "tuned"]
    assert len(tuned) == len(HELD_OUT)
    mean = sum(row.scores["json_fields"] for row in tuned) / len(tuned)
    assert report["contenders"][3]["scores"]["json_fields"]["mean"] == pytest.approx(mean, abs=1e-12)


def test_a_killed_proof_continues_and_asks_nothing_twice(tmp_path):
    whole = prove(tmp_path / "whole", {"few_shot": 0.4, "tuned": 0.9})
    fake = engine({"few_shot": 0.4, "tuned": 0.9})
    generate, calls = fake.generate, 0

    def dies(requests, progress=None):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return generate(requests)

    fake.generate = dies
    with pytest.raises(KeyboardInterrupt):
        prove(tmp_path / "killed", fake=fake)
    with (tmp_path / "killed" / "replies.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')
    with pytest.raises(InputError, match="not finished"):
        report_from_items(tmp_path / "killed" / "items.jsonl")
    before = len(fake.asked)
    fake.generate = generate
    resumed = prove(tmp_path / "killed", fake=fake)
    general = 2 * 24
    cached = sum(1 for line in (tmp_path / "killed" / "replies.jsonl").read_text().splitlines() if line)
    assert len(fake.asked) - general == cached
    assert len(fake.asked) > before
    assert resumed.verdict == whole.verdict
    assert [r.scores for r in resumed.results] == [r.scores for r in whole.results]
    third = engine({})
    prove(tmp_path / "killed", fake=third)
    assert len(third.asked) == general


def test_without_weights_hashes_nothing_is_remembered(tmp_path):
    prove(tmp_path, {"tuned": 0.9}, hashes=False)
    assert not (tmp_path / "replies.jsonl").exists()


def test_a_contender_that_has_lost_stops_and_its_number_of_items_is_told(tmp_path):
    report = prove(tmp_path / "a", {"prompt": 0.0, "few_shot": 0.85, "retrieval": 0.0, "tuned": 0.95})
    items = {each.name: each.items for each in report.results}
    assert items == {"prompt": 24, "few_shot": 120, "retrieval": 24, "tuned": 120}
    assert report.result("prompt").scores["json_fields"].n == 24
    whole = prove(tmp_path / "b", {"prompt": 0.0, "tuned": 0.95}, stop_early=False)
    assert {each.items for each in whole.results} == {120}


def test_rows_without_an_expected_answer_are_counted(tmp_path):
    blank = [chat_row(900 + i, f"Person {i} lives nowhere", "") for i in range(5)]
    report = prove(tmp_path, {"few_shot": 0.4, "tuned": 0.9}, held_out=[*HELD_OUT[:60], *blank])
    tuned = report.result("tuned")
    assert (tuned.items, tuned.no_expected) == (65, 5)
    assert tuned.scores["json_fields"].n == 60
    assert tuned.scores["json_valid"].n == 65


def test_odd_answers_and_raising_graders_are_counted(tmp_path):
    odd = ["", "x" * 100_000, '{"city": NaN}', "<script>alert(1)</script>", "\u2028 line"]
    fake = FakeEngine(lambda adapter, question, request: odd[len(question) % 5] if adapter else "{}")
    grader = tmp_path / "fussy.py"
    grader.write_text("def grade(sample, item):\n    return 1 / len(sample['output_text'].strip()[:1])\n")
    recipe = Prove(contenders=("prompt", "tuned"), max_new_tokens=200_000, retention=False)
    report = prove(tmp_path / "run", fake=fake, prove=recipe, held_out=HELD_OUT[:40], grader_file=grader)
    tuned = report.result("tuned")
    blank = sum(not row.output.strip() for row in report.rows if row.contender == "tuned")
    assert tuned.scores["fussy"].n == 40
    assert tuned.empty == tuned.scorer_faults == blank
    assert report_from_items(tmp_path / "run" / "items.jsonl").to_json() == report.to_json()


def test_a_model_judges_and_an_unknown_one_is_a_sentence(tmp_path):
    recipe = Prove(contenders=("prompt", "tuned"), scorers=("exact_match", {"judge": "base"}), retention=False)
    fake = FakeEngine(lambda adapter, question, request: "A" if "<answer" in question else f"said by {adapter}")
    report = prove(tmp_path, fake=fake, prove=recipe, held_out=HELD_OUT[:24])
    assert report.result("tuned").scores["judge"].mean == 0.5
    assert report.result("tuned").scores["judge_agreement"].mean == 0.0
    unknown = Prove(scorers=({"judge": "nobody"},))
    with pytest.raises(InputError, match='"nobody" is not known here'):
        prove(tmp_path, fake=fake, prove=unknown)


def test_nothing_held_out_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no held-out rows"):
        prove(tmp_path, held_out=[])


def test_before_there_is_a_tuned_model_the_rest_is_measured(tmp_path):
    fake = engine({"few_shot": 0.8})
    recipe = Recipe(data=Data(train="x.jsonl"))
    report = prove_items(HELD_OUT, TRAIN, recipe, Voices(Weights(fake)), tmp_path)
    assert [each.name for each in report.results] == ["prompt", "few_shot", "retrieval"]
    assert report.verdict.decision == "hold"
    assert report.retention is None


def test_runs_are_compared_item_by_item(tmp_path):
    first = prove(tmp_path / "a", {"few_shot": 0.4, "tuned": 0.95})
    second = prove(tmp_path / "b", {"few_shot": 0.4, "tuned": 0.5})
    comparison = compare_reports(first, second, ("a", "b"))
    lines = {name: pair for name, _, _, pair in comparison.lines}
    assert lines["tuned"].diff > 0.1
    assert lines["few_shot"].diff == 0
    assert comparison.common_items == 120
    assert json.dumps(comparison.to_json())
    assert comparison.render().row_count == 4
    page = render_comparison(replace(comparison, a="<script>a"))
    assert "<script>" not in page
    assert "on the 120 held-out items both answered" in page


def test_runs_named_by_folder_go_by_its_last_part_where_that_tells_them_apart(tmp_path):
    one, two, namesake = (tmp_path / name for name in ("one", "two", "more/one"))
    for folder in (one, two, namesake):
        folder.mkdir(parents=True)
        prove(folder, {"few_shot": 0.4, "tuned": 0.95})
        Run(folder).recipe.touch()
    apart, alike = compare(str(one), str(two)), compare(str(one), str(namesake))
    assert (apart.a, apart.b) == ("one", "two")
    assert (alike.a, alike.b) == (str(one), str(namesake))


def test_a_sample_is_scored_during_training():
    from tunesmith.data.items import items

    fake = engine({"tuned": 0.9})
    sample = [*evenly(items(HELD_OUT), 24)]
    weights = Weights(fake, "tuned", "moving")
    scores = score_sample(weights, sample, exact_match(), max_tokens=64)
    assert len(scores) == 24
    assert 0.6 < sum(scores) / 24 <= 1
    assert len({item.id for item in sample}) == 24
