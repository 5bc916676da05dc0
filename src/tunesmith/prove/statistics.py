"""Intervals, tests and power for scores of items. Pure numpy: a score is a number in an array, nothing more.

Items that share a group (the same customer, the same document, copies of one row) are not independent, so every
resample draws whole groups. With one item a group this is the ordinary bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from tunesmith.types import Interval

RESAMPLES = 2000
FLIPS = 9999
CONFIDENCE = 0.95
_ELEMENTS_AT_ONCE = 4_000_000  # of the resampling matrix, so that memory stays flat at any number of items
_NORMAL = NormalDist()
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def mean_interval(
    scores: Sequence[float], groups: Sequence[Hashable] | None = None, *, confidence: float = CONFIDENCE
) -> Interval:
    """The mean and its interval.

    Yes/no scores of independent items: Wilson's interval (Wilson 1927), which stays honest at 0% and 100%, where a
    bootstrap has nothing to resample. Anything else: the BCa bootstrap (Efron 1987) over groups.
    """
    values = np.asarray(scores, dtype=np.float64)
    n = len(values)
    if n == 0:
        return Interval(float("nan"), (float("nan"), float("nan")), 0)
    sums, sizes = _per_group(values, groups)
    mean = float(values.sum() / n)
    if np.all((values == 0) | (values == 1)) and (len(sums) == n or mean in (0.0, 1.0)):
        return Interval(mean, wilson(mean, len(sums), confidence), n)
    return Interval(mean, _bca(sums, sizes, confidence), n)


def wilson(share: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval for a share of n: (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    z = _NORMAL.inv_cdf(0.5 + confidence / 2)
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    bottom = 1 + z * z / n
    low, high = (middle - half) / bottom, (middle + half) / bottom
    return 0.0 if share == 0 else low, 1.0 if share == 1 else high  # exactly, whatever rounding says


def difference_interval(
    a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable] | None = None, *, confidence: float = CONFIDENCE
) -> Interval:
    """The mean of a - b, item by item, with its BCa interval over groups."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if len(difference) == 0:
        return Interval(float("nan"), (float("nan"), float("nan")), 0)
    sums, sizes = _per_group(difference, groups)
    return Interval(float(difference.mean()), _bca(sums, sizes, confidence), len(difference))


def statistic_interval(
    statistic: Callable[[Counts], Floats],
    groups: Sequence[Hashable],
    *,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of a statistic that is no mean, such as macro F1.

    `statistic` takes how often each item was drawn, [resamples, items], and gives one value a resample.
    """
    n = len(groups)
    codes, n_groups = _codes(groups)
    point = float(statistic(np.ones((1, n), dtype=np.int64))[0])
    draws = np.random.default_rng(0)
    values: list[Floats] = []
    step = max(1, _ELEMENTS_AT_ONCE // max(n, 1))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = draws.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=size)  # [size, groups]
        values.append(statistic(drawn[:, codes]))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(values), [tail, 100 - tail])
    return Interval(point, (float(low), float(high)), n)


def paired_p_value(a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable] | None = None) -> float:
    """Two-sided p of "a and b score alike", items paired.

    Yes/no scores of independent items: the exact McNemar test. Else a permutation test that swaps a and b within
    whole groups: p = (1 + #{|swapped| >= |observed|}) / (1 + swaps) (Phipson and Smyth 2010).
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    difference = first - second
    sums, _ = _per_group(difference, groups)
    if len(sums) == len(difference) and np.all(np.isin(difference, (-1.0, 0.0, 1.0))):
        return mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    observed = abs(sums.sum())
    moving = sums[sums != 0]
    if len(moving) == 0:
        return 1.0
    draws = np.random.default_rng(0)
    as_far = 0
    step = max(1, _ELEMENTS_AT_ONCE // len(moving))
    for start in range(0, FLIPS, step):
        signs = draws.integers(0, 2, size=(min(step, FLIPS - start), len(moving))) * 2 - 1
        as_far += int((np.abs(signs @ moving) >= observed - 1e-12).sum())
    return (1 + as_far) / (1 + FLIPS)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact McNemar (1947): two-sided binomial test that the discordant items split evenly."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    # log C(n,k) - n log 2, summed over the lower tail: no overflow at any n
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - n * math.log(2)) for log in logs))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm (1979): p-values that keep the chance of any false claim in the family at its level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted


def minimum_detectable_effect(
    a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable] | None = None, *, power: float = 0.8
) -> float:
    """The smallest true paired difference these items would show as significant at 5%, with `power`.

    (z_0.975 + z_power) · standard error of the mean difference, the error taken over groups. Where the differences
    don't vary at all, their spread is taken as if one item in n + 4 differed (the plus-four rule of Agresti and Coull).
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(difference)
    if n < 2:
        return float("nan")
    n_groups = n if groups is None else len(set(groups))
    floor = math.sqrt(1 / (n_groups + 4) / n_groups)
    z = _NORMAL.inv_cdf(0.975) + _NORMAL.inv_cdf(power)
    return float(min(2.0, z * max(standard_error(difference, groups), floor)))


def standard_error(values: Sequence[float] | Floats, groups: Sequence[Hashable] | None = None) -> float:
    """Standard error of the mean over items drawn in groups, as a ratio of sums (Cochran 1977, section 2.11)."""
    sums, sizes = _per_group(np.asarray(values, dtype=np.float64), groups)
    n_groups = len(sums)
    if n_groups < 2:
        return float("inf")
    residual = sums - sums.sum() / sizes.sum() * sizes
    return math.sqrt(n_groups / (n_groups - 1) * float((residual**2).sum())) / float(sizes.sum())


def _codes(groups: Sequence[Hashable]) -> tuple[npt.NDArray[np.int64], int]:
    """Groups as numbers in order of first appearance."""
    seen: dict[Hashable, int] = {}
    codes = np.array([seen.setdefault(group, len(seen)) for group in groups], dtype=np.int64)
    return codes, len(seen)


def _per_group(values: Floats, groups: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """The sum and the number of items of every group, both [groups]."""
    if groups is None:
        return values, np.ones(len(values))
    assert len(groups) == len(values), "one group for every score"
    codes, n_groups = _codes(groups)
    sizes = np.bincount(codes, minlength=n_groups).astype(np.float64)
    return np.bincount(codes, values, n_groups).astype(np.float64), sizes


def _bca(sums: Floats, sizes: Floats, confidence: float) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap of sum(sums) / sum(sizes), groups drawn with replacement."""
    point = float(sums.sum() / sizes.sum())
    means = _resampled_means(sums, sizes)
    if len(sums) < 2 or means.min() == means.max():
        return point, point
    below = (np.count_nonzero(means < point) + np.count_nonzero(means <= point)) / (2 * len(means))
    below = min(max(below, 1 / (len(means) + 1)), len(means) / (len(means) + 1))
    bias = _NORMAL.inv_cdf(below)
    without = (sums.sum() - sums) / (sizes.sum() - sizes)  # jackknife over groups
    spread = without.mean() - without
    bottom = 6 * float((spread**2).sum()) ** 1.5
    acceleration = float((spread**3).sum()) / bottom if bottom > 0 else 0.0
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + _NORMAL.inv_cdf(tail)
        ends.append(100 * _NORMAL.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.percentile(means, ends)
    return float(min(low, point)), float(max(high, point))


def _resampled_means(sums: Floats, sizes: Floats) -> Floats:
    draws = np.random.default_rng(0)
    groups = len(sums)
    step = max(1, _ELEMENTS_AT_ONCE // groups)
    means: list[Floats] = []
    for start in range(0, RESAMPLES, step):
        drawn = draws.integers(0, groups, size=(min(step, RESAMPLES - start), groups))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)
