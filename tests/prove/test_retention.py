"""Retention: the shipped prompts, what drift means, and where the threshold lies."""

from __future__ import annotations

import json
import math

import pytest

from fakes import FakeEngine
from tunesmith.prove.answering import Weights
from tunesmith.prove.retention import (
    DATA,
    LOST_DRIFT,
    Measurements,
    measure_retention,
    repetition,
    summarise,
)


def measure(surprise, script=None, prompts=24):
    engine = FakeEngine(
        script or (lambda adapter, question, request: f"{adapter} says hello"), {None: 1.0, "tuned": surprise}
    )
    return measure_retention(Weights(engine), Weights(engine, "tuned"), prompts=prompts), engine


def test_200_prompts_of_20_topics_are_shipped():
    rows = [json.loads(line) for line in (DATA / "general_prompts.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 200
    assert len({row["id"] for row in rows}) == 200
    assert len({row["topic"] for row in rows}) == 20


def test_drift_is_the_logprob_lost_on_the_bases_own_answers():
    measured, engine = measure(1.4)
    assert [each.drift for each in measured.prompts] == pytest.approx([0.4] * 24)
    summary = summarise(measured)
    assert summary["drift"]["mean"] == pytest.approx(0.4)
    assert summary["perplexity"]["base"] == pytest.approx(math.e)
    assert summary["perplexity"]["ratio"]["mean"] == pytest.approx(math.exp(0.4))
    assert summary["kept"]
    assert {request.adapter for request in engine.asked} == {None, "tuned"}


def test_beyond_the_threshold_it_is_lost():
    summary = summarise(measure(1.0 + 2 * LOST_DRIFT)[0])
    assert not summary["kept"]
    assert len(summary["reasons"]) == 2
    assert "drift 6.00" in summary["reasons"][0]


def test_what_moved_is_said_and_is_not_lost():
    assert summarise(measure(1.3)[0])["moved"] == []
    summary = summarise(measure(1.9)[0])
    assert summary["kept"]
    assert "perplexity of prose 2.46 times" in summary["moved"][0]


def test_length_stops_and_loops_are_measured():
    def script(adapter, question, request):
        return "la la la " * 40 if adapter else "Fine."

    summary = summarise(measure(1.0, script)[0])
    assert summary["stop_rate"] == {"base": 1.0, "tuned": 0.0}
    assert summary["length"] == {"base": 6.0, "tuned": 48.0}
    assert summary["repetition"]["base"] == 0.0
    assert summary["repetition"]["tuned"] > 0.9


def test_the_sample_is_spread_over_the_topics():
    measured, _ = measure(1.0, prompts=20)
    assert len({each.prompt.rsplit("-", 1)[0] for each in measured.prompts}) == 20


def test_measurements_survive_json():
    measured, _ = measure(1.2)
    again = Measurements.from_json(json.loads(json.dumps(measured.to_json())))
    assert again == measured
    assert summarise(again) == summarise(measured)


def test_an_empty_answer_has_no_drift():
    measured, _ = measure(9.0, lambda adapter, question, request: "")
    assert measured.prompts[0].base_tokens == 1
    assert repetition([]) == 0.0
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
