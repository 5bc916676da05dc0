"""What is computed from the rows: a result for each contender, a paired difference for each two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.prove.rows import Row
from tunesmith.prove.statistics import (
    difference_interval,
    holm,
    mean_interval,
    minimum_detectable_effect,
    paired_p_value,
    statistic_interval,
)
from tunesmith.types import Interval


@dataclass(frozen=True, slots=True)
class Prices:
    """What the user says things cost; None where nothing was said."""

    per_hour: float | None = None  # of the machine
    per_million_prompt_tokens: float | None = None
    per_million_output_tokens: float | None = None
    currency: str = "USD"


@dataclass(frozen=True, slots=True)
class Result:
    """One contender over all items it answered."""

    name: str
    kind: str
    scores: dict[str, Interval]
    items: int
    prompt_tokens_mean: float
    output_tokens_mean: float
    seconds_per_item: float
    cost_per_1k: float | None
    stop_rate: float  # answers that ended by themselves
    empty: int  # answers without a visible character
    unanswered: int  # no answer at all: the endpoint failed, or the prompt did not fit
    scorer_faults: int  # answers on which a scorer raised; counted as 0
    no_expected: int  # items that can't be compared, outside every mean

    def to_json(self) -> dict[str, Any]:
        """The contract's keys, and the counts beside them."""
        return {
            "name": self.name,
            "kind": self.kind,
            "scores": {name: interval_json(interval) for name, interval in self.scores.items()},
            "items": self.items,
            "prompt_tokens_mean": self.prompt_tokens_mean,
            "output_tokens_mean": self.output_tokens_mean,
            "seconds_per_item": self.seconds_per_item,
            "cost_per_1k": self.cost_per_1k,
            "stop_rate": self.stop_rate,
            "empty": self.empty,
            "unanswered": self.unanswered,
            "scorer_faults": self.scorer_faults,
            "no_expected": self.no_expected,
        }


@dataclass(frozen=True, slots=True)
class Paired:
    """a - b on the items both answered. `p_holm` is corrected over all pairs of the report."""

    a: str
    b: str
    scorer: str
    diff: float
    ci: tuple[float, float]
    p: float
    p_holm: float
    n: int
    groups: int
    minimum_detectable_effect: float

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a, "b": self.b, "scorer": self.scorer, "diff": self.diff, "ci": list(self.ci),
            "p": self.p, "p_holm": self.p_holm, "n": self.n,
        }  # fmt: skip

    def reversed(self) -> Paired:
        """b - a."""
        low, high = self.ci
        return replace(self, a=self.b, b=self.a, diff=-self.diff, ci=(-high, -low))


def interval_json(interval: Interval) -> dict[str, Any]:
    """{"mean", "ci", "n"}, null where there was nothing to average."""
    if interval.n == 0 or math.isnan(interval.mean):
        return {"mean": None, "ci": [None, None], "n": 0}
    return {"mean": interval.mean, "ci": list(interval.ci), "n": interval.n}


def by_contender(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each contender, contenders in order of first appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.contender, []).append(row)
    return found


def result(rows: Sequence[Row], prices: Prices) -> Result:
    """One contender's rows, measured."""
    scores: dict[str, Interval] = {}
    for scorer in rows[0].scores:
        scored = [(row.scores[scorer], row.group) for row in rows if row.scores.get(scorer) is not None]
        scores[scorer] = mean_interval([score or 0.0 for score, _ in scored], [group for _, group in scored])
    if "label" in scores:
        scores["macro_f1"] = macro_f1(rows)
    n = len(rows)
    prompt_tokens, output_tokens = (_mean([getattr(row, name) for row in rows]) for name in TOKENS)
    seconds = _mean([row.seconds for row in rows])
    return Result(
        name=rows[0].contender,
        kind=rows[0].kind,
        scores=scores,
        items=n,
        prompt_tokens_mean=prompt_tokens,
        output_tokens_mean=output_tokens,
        seconds_per_item=seconds,
        cost_per_1k=_price(prices, rows[0].kind, prompt_tokens, output_tokens, seconds),
        stop_rate=_mean([row.finish_reason == "stop" for row in rows]),
        empty=sum(not row.output.strip() for row in rows if "answer" not in row.faults),
        unanswered=sum("answer" in row.faults for row in rows),
        scorer_faults=sum(bool(row.faults.keys() - {"answer"}) for row in rows),
        no_expected=sum(row.expected is None for row in rows),
    )


TOKENS = ("prompt_tokens", "output_tokens")


def all_pairs(rows: Mapping[str, Sequence[Row]], scorer: str) -> list[Paired]:
    """Every two contenders on the items both answered, tuned ones first, p-values corrected over all pairs (Holm)."""
    tuned_first = sorted(rows, key=lambda name: rows[name][0].kind != "tuned")
    found = [_pair(a, b, rows, scorer) for a, b in combinations(tuned_first, 2)]
    pairs = [pair for pair in found if pair is not None]
    corrected = holm([pair.p for pair in pairs])
    return [replace(pair, p_holm=p) for pair, p in zip(pairs, corrected, strict=True)]


def macro_f1(rows: Sequence[Row]) -> Interval:
    """The plain mean over expected labels of 2TP / (2TP + FP + FN); an answer that is no label counts against recall.

    In a resample, labels that are not drawn are left out of the mean.
    """
    scored = [row for row in rows if row.expected is not None]
    expected = np.array([(row.expected or "").strip() for row in scored], dtype=object)
    answered = np.array([row.label for row in scored], dtype=object)
    labels = sorted(set(expected))
    is_expected = np.array([expected == label for label in labels], dtype=np.float64)  # [labels, items]
    is_answered = np.array([answered == label for label in labels], dtype=np.float64)

    def statistic(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        weights = counts.astype(np.float64)  # [resamples, items]
        hits = weights @ (is_expected * is_answered).T  # [resamples, labels]
        total_expected, total_answered = weights @ is_expected.T, weights @ is_answered.T
        f1 = 2 * hits / np.maximum(total_expected + total_answered, 1e-12)
        drawn = total_expected > 0
        return (f1 * drawn).sum(axis=1) / np.maximum(drawn.sum(axis=1), 1)

    if not scored:
        return Interval(float("nan"), (float("nan"), float("nan")), 0)
    return statistic_interval(statistic, [row.group for row in scored])


def _pair(a: str, b: str, rows: Mapping[str, Sequence[Row]], scorer: str) -> Paired | None:
    """a - b, its p-value not yet corrected; None where they share no item."""
    first, second, groups = _common(rows[a], rows[b], scorer)
    if not first:
        return None
    difference = difference_interval(first, second, groups)
    return Paired(
        a=a,
        b=b,
        scorer=scorer,
        diff=difference.mean,
        ci=difference.ci,
        p=(p := paired_p_value(first, second, groups)),
        p_holm=p,
        n=len(first),
        groups=len(set(groups)),
        minimum_detectable_effect=minimum_detectable_effect(first, second, groups),
    )


def _common(a: Sequence[Row], b: Sequence[Row], scorer: str) -> tuple[list[float], list[float], list[str]]:
    """Scores of both on the items that both answered and that can be scored."""
    other = {row.item: row.scores.get(scorer) for row in b}
    first: list[float] = []
    second: list[float] = []
    groups: list[str] = []
    for row in a:
        mine, theirs = row.scores.get(scorer), other.get(row.item)
        if mine is not None and theirs is not None:
            first.append(mine)
            second.append(theirs)
            groups.append(row.group)
    return first, second, groups


def _price(prices: Prices, kind: str, prompt_tokens: float, output_tokens: float, seconds: float) -> float | None:
    """Per 1,000 calls: machine time for what runs here, tokens for an endpoint; None where no price was stated."""
    if kind == "endpoint":
        if prices.per_million_prompt_tokens is None and prices.per_million_output_tokens is None:
            return None
        spent = prompt_tokens * (prices.per_million_prompt_tokens or 0)
        return (spent + output_tokens * (prices.per_million_output_tokens or 0)) / 1000
    return None if prices.per_hour is None else seconds * 1000 / 3600 * prices.per_hour


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values) if values else 0.0
