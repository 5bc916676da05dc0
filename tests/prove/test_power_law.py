"""The law's intervals hold the truth as often as they say, and it owns up where it can't tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.prove.need import Need, measured, write_picture
from tunesmith.prove.power_law import fit

SHARES = (100, 200, 400, 800)


def curve(rows, level, floor, exponent):
    return level * (floor + (1 - floor) * (SHARES[-1] / np.asarray(rows, float)) ** exponent)


def losses(draws, truth, items, noise=0.0):
    """Losses [items, shares] around `truth`: rows differ much, though alike under every share; trainings a little."""
    rows = draws.gamma(2.0, 0.5, size=(items, 1)) * np.exp(0.3 * draws.normal(size=(items, len(truth))) - 0.045)
    return np.asarray(truth) * rows * np.exp(noise * draws.normal(size=len(truth)))


def test_intervals_hold_the_truth_19_times_in_20():
    """Curves of every kind, trainings that differ by chance, 64 held-out rows: now, at 2 and at 4 times the rows."""
    draws, held = np.random.default_rng(3), []
    for _ in range(90):
        kind = (0.2, draws.uniform(0, 1), np.exp(draws.uniform(np.log(0.05), np.log(1.0))))
        values = losses(draws, curve(SHARES, *kind), 64, noise=np.exp(draws.uniform(np.log(0.005), np.log(0.08))))
        law = fit(SHARES, values.mean(0).tolist(), np.cov(values.T) / len(values))
        for rows in (800, 1600, 3200):
            expected = law.at(rows)
            held.append(expected.low <= curve(rows, *kind) <= expected.high)
    assert 0.89 <= np.mean(held) <= 0.99, np.mean(held)


@settings(max_examples=12, deadline=None)
@given(st.floats(0.01, 10), st.floats(0, 1), st.floats(0.1, 1.0), st.integers(1, 50))
def test_the_law_does_not_care_about_units(level, floor, exponent, times):
    points, exact = curve(SHARES, level, floor, exponent), np.eye(4) * (0.005 * level) ** 2
    law = fit(SHARES, points.tolist(), exact)
    other = fit([times * n for n in SHARES], (7 * points).tolist(), 49 * exact)
    for rows in (50, 800, 5000):
        assert other.at(times * rows).expected == pytest.approx(7 * law.at(rows).expected, rel=1e-6)
    assert law.fits
    assert law.at(800).low <= points[-1] <= law.at(800).high
    values = [law.at(rows).expected for rows in (100, 800, 1600, 3200)]
    assert values == sorted(values, reverse=True)
    assert law.chance_of_gain(800, 1600, 0.0) == 1.0


@pytest.mark.parametrize(
    ("truth", "items", "answer"),
    [
        ((0.40, 0.29, 0.22, 0.17), 400, "helps"),
        ((0.20, 0.20, 0.20, 0.20), 400, "hardly"),
        ((0.20, 0.26, 0.34, 0.45), 64, "unknown"),  # worse with more rows: no power law
    ],
)
def test_what_is_answered_about_a_loss(truth, items, answer):
    found = measured("held-out loss", SHARES, losses(np.random.default_rng(1), truth, items), is_loss=True)
    assert found.answer(800) == answer
    said = {"helps": "more rows would help", "hardly": "would hardly help", "unknown": "can't be told"}[answer]
    assert said in found.sentence(800)


def right_or_wrong(truth, items):
    """Scores [items, shares]: hard rows are hard for every share."""
    draws = np.random.default_rng(2)
    hardness = 0.7 * draws.random((items, 1)) + 0.3 * draws.random((items, 4))
    return (hardness < np.asarray(truth)) * 1.0


def test_a_score_is_said_in_percent_and_stays_below_100():
    found = measured("accuracy", SHARES, right_or_wrong((0.45, 0.6, 0.72, 0.82), 400), is_loss=False)
    assert found.answer(800) == "helps"
    assert "with 1,600 examples expect " in found.sentence(800)
    assert "% (" in found.sentence(800)
    perfect = measured("accuracy", SHARES, np.ones((40, 4)), is_loss=False)
    assert perfect.answer(800) == "hardly"
    assert perfect.at(3200).high <= 1
    assert perfect.at(3200).low > 0.9


def test_a_handful_of_answers_cannot_tell():
    """24 answers, of which one more or less is 4 points: neither yes nor no."""
    found = measured("accuracy", SHARES, right_or_wrong((0.5, 0.55, 0.6, 0.65), 24), is_loss=False)
    assert found.answer(800) == "unknown"


def test_the_picture_is_drawn(tmp_path):
    loss = measured("held-out loss", SHARES, losses(np.random.default_rng(1), (0.4, 0.3, 0.2, 0.2), 64), is_loss=True)
    score = measured("accuracy", SHARES, right_or_wrong((0.5, 0.6, 0.7, 0.8), 64), is_loss=False)
    need = Need(800, SHARES, 50, 1.0, (score, loss))
    write_picture(need, tmp_path / "need.svg")
    assert (tmp_path / "need.svg").read_text().count("800 rows there are</text>") == 2
    facts = need.to_json()
    assert [each["name"] for each in facts["measures"]] == ["accuracy", "held-out loss"]
    assert [each["rows"] for each in facts["measures"][0]["expected"]] == [800, 1600, 3200]
