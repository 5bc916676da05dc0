"""Intervals that cover, tests that agree with scipy, power that holds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tunesmith.prove.statistics import (
    difference_interval,
    holm,
    mcnemar,
    mean_interval,
    minimum_detectable_effect,
    paired_p_value,
    standard_error,
    statistic_interval,
    wilson,
)

RUNS = 500


def field_f1(draws, n):
    """Half fully right, a tenth fully wrong, the rest in between."""
    kind = draws.random(n)
    return np.where(kind < 0.5, 1.0, np.where(kind < 0.6, 0.0, draws.beta(3, 2, n))), 0.74


def yes_no(draws, n):
    """Right or wrong, as often right as a share drawn from 5% to 95%: at one share alone a discrete score zigzags."""
    share = draws.uniform(0.05, 0.95)
    return (draws.random(n) < share) * 1.0, share


def differences(draws, n):
    """Mostly no difference, some wins, fewer losses."""
    return draws.choice([0.0, 1.0, -1.0, 0.5], size=n, p=[0.65, 0.15, 0.05, 0.15]), 0.175


@pytest.mark.parametrize(
    ("draw", "interval"),
    [
        (field_f1, mean_interval),
        (yes_no, mean_interval),
        (differences, lambda scores: difference_interval(scores, np.zeros(len(scores)))),
    ],
    ids=["field F1", "yes or no", "paired difference"],
)
def test_95_percent_intervals_cover_93_to_97_percent(draw, interval):
    draws = np.random.default_rng(7)
    covered = 0
    for _ in range(RUNS):
        scores, mean = draw(draws, 100)
        low, high = interval(scores).ci
        covered += low <= mean <= high
    assert 0.93 <= covered / RUNS <= 0.97


def test_clustered_intervals_cover_where_naive_ones_do_not():
    draws = np.random.default_rng(8)
    groups = [group for group in range(40) for _ in range(5)]
    clustered = naive = 0
    for _ in range(RUNS):
        centres = draws.normal(0.5, 0.15, 40)
        scores = np.clip(np.repeat(centres, 5) + draws.normal(0, 0.1, 200), 0, 1)
        for low, high, which in (
            (*mean_interval(scores, groups).ci, "clustered"),
            (*mean_interval(scores).ci, "naive"),
        ):
            covers = low <= 0.5 <= high
            clustered += covers and which == "clustered"
            naive += covers and which == "naive"
    assert 0.93 <= clustered / RUNS <= 0.97
    assert naive / RUNS < 0.85


def test_bca_is_scipys():
    scores = field_f1(np.random.default_rng(1), 120)[0]
    mine = mean_interval(scores).ci
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=20000, method="BCa", rng=0).confidence_interval
    assert mine == pytest.approx(tuple(theirs), abs=0.006)


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (3, 50), (50, 50), (72, 145)])
def test_wilson_is_scipys(hits, n):
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_all_right_is_not_certainty():
    low, high = mean_interval([1.0] * 48).ci
    assert high == 1.0
    assert 0.9 < low < 0.95
    assert mean_interval([1.0] * 48, ["one group"] * 48).ci[0] < 0.3


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 9), (12, 30), (700, 400)])
def test_mcnemar_is_the_binomial_test(a, b):
    expected = stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-6)


def test_permutation_p_value_is_scipys():
    draws = np.random.default_rng(3)
    a, b = draws.beta(4, 2, 30), draws.beta(3.2, 2, 30)
    theirs = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=20000, rng=0
    ).pvalue
    assert paired_p_value(a, b) == pytest.approx(theirs, abs=0.015)
    assert paired_p_value(a, a) == 1.0


def test_swapping_whole_groups_sees_less_evidence():
    a, b = [0.9] * 20, [0.4] * 20
    assert paired_p_value(a, b) < 0.001
    assert paired_p_value(a, b, ["x"] * 10 + ["y"] * 10) > 0.4


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_minimum_detectable_effect_is_seen_four_times_in_five():
    draws = np.random.default_rng(5)
    spread, n = 0.5, 145
    pilot = draws.normal(0, spread, n)
    pilot *= spread / pilot.std(ddof=1)
    effect = minimum_detectable_effect(pilot, np.zeros(n))
    seen = [abs(x.mean()) > 1.96 * x.std(ddof=1) / n**0.5 for x in draws.normal(effect, spread, (2000, n))]
    assert 0.77 <= np.mean(seen) <= 0.83


def test_equal_answers_still_have_a_minimum_detectable_effect():
    assert 0 < minimum_detectable_effect([1.0] * 50, [1.0] * 50) < 0.2


def test_standard_error_without_groups_is_the_textbooks():
    scores = field_f1(np.random.default_rng(2), 50)[0]
    assert standard_error(scores) == pytest.approx(stats.sem(scores))


def test_a_statistic_that_is_a_mean_agrees_with_the_mean():
    scores = field_f1(np.random.default_rng(4), 100)[0]
    found = statistic_interval(lambda counts: counts @ scores / counts.sum(axis=1), list(range(100)))
    assert found.mean == pytest.approx(scores.mean())
    assert found.ci == pytest.approx(mean_interval(scores).ci, abs=0.02)


def test_nothing_to_average_is_not_zero():
    assert np.isnan(mean_interval([]).mean)
