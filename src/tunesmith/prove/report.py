"""The report: everything computed from items.jsonl, and nothing from anywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.prove.compression import break_even_calls, compare_with_prompt
from tunesmith.prove.measures import Paired, Prices, Result, all_pairs, by_contender, interval_json, result
from tunesmith.prove.retention import Measurements, summarise
from tunesmith.prove.rows import Row, read_rows
from tunesmith.prove.statistics import difference_interval, mean_interval
from tunesmith.prove.verdict import Verdict, best_alternative, best_tuned, decide, find_pair
from tunesmith.store.runs import write_json

SMALLEST_SLICE = 8
EXAMPLES = 5  # wins and losses named per slice


@dataclass(frozen=True, slots=True)
class Report:
    """A finished proof. `rows` are items.jsonl; `proof` its settings."""

    scorer: str
    results: tuple[Result, ...]
    pairs: tuple[Paired, ...]
    minimum_detectable_effect: float | None
    slices: tuple[dict[str, Any], ...]
    retention: dict[str, Any] | None
    cost: dict[str, Any]
    compression: dict[str, Any] | None
    verdict: Verdict
    rows: tuple[Row, ...]
    proof: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The contract's report.json."""
        return {
            "scorer": self.scorer,
            "scorers": self.proof["scorers"],
            "held_out": self.proof["held_out"],
            "contenders": [each.to_json() for each in self.results],
            "paired": [pair.to_json() for pair in self.pairs],
            "minimum_detectable_effect": self.minimum_detectable_effect,
            "slices": list(self.slices),
            "retention": self.retention if self.retention is not None else {},
            "cost": self.cost,
            "compression": self.compression,
            "choices": self.proof["choices"],
            "verdict": self.verdict.to_json(),
        }

    def render(self) -> Any:
        """The ladder, the verdict and three items, for the terminal (rich)."""
        from tunesmith.prove.terminal import render

        return render(self)

    def result(self, name: str) -> Result:
        """A contender's result by name."""
        return next(each for each in self.results if each.name == name)


def report_from_items(path: Path) -> Report:
    """The report of a finished items.jsonl: the same bytes give the same numbers to the last digit."""
    rows, proof = read_rows(path)
    return build_report(rows, proof)


def build_report(rows: Sequence[Row], proof: Mapping[str, Any]) -> Report:
    """Compute every number. `proof` is what the first row of items.jsonl carries."""
    scorer = proof["scorer"]
    prices = Prices(**proof["prices"])
    grouped = by_contender(rows)
    results = [result(each, prices) for each in grouped.values()]
    pairs = all_pairs(grouped, scorer)
    measured = proof["retention"]
    retention = summarise(Measurements.from_json(measured)) if measured is not None else None
    tuned, alternative = best_tuned(results, pairs, scorer), best_alternative(results, scorer)
    pair = find_pair(pairs, tuned.name, alternative.name) if tuned and alternative else None
    margin = proof.get("compress_margin")
    cost = _cost(tuned, alternative, proof)
    compression = (
        None if margin is None else compare_with_prompt(results, pairs, scorer, margin, proof["training_seconds"])
    )
    return Report(
        scorer=scorer,
        results=tuple(results),
        pairs=tuple(pairs),
        minimum_detectable_effect=None if pair is None else pair.minimum_detectable_effect,
        slices=tuple(_slices(grouped, scorer, tuned, alternative)),
        retention=retention,
        cost=cost,
        compression=None if compression is None else compression.to_json(),
        verdict=decide(results, pairs, scorer, retention)
        if compression is None
        else compression.decide(scorer, retention),
        rows=tuple(rows),
        proof=dict(proof),
    )


def write_report(report: Report, path: Path) -> None:
    """report.json, whole or not at all."""
    write_json(path, report.to_json())


def _cost(tuned: Result | None, alternative: Result | None, proof: Mapping[str, Any]) -> dict[str, Any]:
    """What training took, and after how many calls it has paid for itself against the best alternative.

    Calls = training seconds / (alternative's seconds a call - tuned seconds a call): both on the same machine, so a
    price an hour cancels out. None where the tuned model is no faster, or training time is unknown.
    """
    prices, seconds = Prices(**proof["prices"]), proof["training_seconds"]
    calls = price = None
    if seconds is not None and prices.per_hour is not None:
        price = seconds / 3600 * prices.per_hour
    if tuned is not None and alternative is not None:
        calls = break_even_calls(seconds, alternative, tuned)
    return {
        "currency": prices.currency,
        "price_per_hour": prices.per_hour,
        "training_seconds": seconds,
        "training_price": price,
        "compared_with": None if alternative is None else alternative.name,
        "break_even_calls": calls,
    }


def _slices(
    grouped: Mapping[str, Sequence[Row]], scorer: str, tuned: Result | None, alternative: Result | None
) -> list[dict[str, Any]]:
    """Each slice of 8 items or more: every contender's score, and the tuned arm against the best alternative.

    `worse` marks a slice whose difference lies wholly below 0.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for rows in grouped.values():
        for row in rows:
            for name, value in row.slices.items():
                values.setdefault((name, value), set()).add(row.item)
    found: list[dict[str, Any]] = []
    for (name, value), items in sorted(values.items()):
        if len(items) < SMALLEST_SLICE:
            continue
        inside = {who: [row for row in rows if row.item in items] for who, rows in grouped.items()}
        entry: dict[str, Any] = {"slice": name, "value": value, "n": len(items), "scores": _means(inside, scorer)}
        if tuned is not None and alternative is not None:
            entry |= _difference(inside[tuned.name], inside[alternative.name], scorer)
        found.append(entry)
    return found


def _means(inside: Mapping[str, Sequence[Row]], scorer: str) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for who, rows in inside.items():
        scored = [(row.scores[scorer], row.group) for row in rows if row.scores.get(scorer) is not None]
        interval = mean_interval([score or 0.0 for score, _ in scored], [group for _, group in scored])
        means[who] = interval_json(interval)
    return means


def _difference(tuned: Sequence[Row], other: Sequence[Row], scorer: str) -> dict[str, Any]:
    against = {row.item: row.scores.get(scorer) for row in other}
    common: list[tuple[Row, float]] = []
    for row in tuned:
        mine, theirs = row.scores.get(scorer), against.get(row.item)
        if mine is not None and theirs is not None:
            common.append((row, mine - theirs))
    if not common:
        return {}
    zeros = [0.0] * len(common)
    interval = difference_interval([by for _, by in common], zeros, [row.group for row, _ in common])
    ordered = sorted(common, key=lambda pair: (pair[1], pair[0].item))
    return {
        "a": tuned[0].contender,
        "b": other[0].contender,
        "diff": interval.mean,
        "ci": list(interval.ci),
        "compared": interval.n,
        "worse": interval.ci[1] < 0,
        "losses": [row.item for row, by in ordered[:EXAMPLES] if by < 0],
        "wins": [row.item for row, by in reversed(ordered[-EXAMPLES:]) if by > 0],
    }
