"""plan.json: what a run is expected to take, and afterwards what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.prove.need import Need
from tunesmith.store.runs import Run, read_metrics, write_json
from tunesmith.train.estimate import Estimate


@dataclass(frozen=True, slots=True)
class Plan:
    """An estimate of training, for a person and for plan.json.

    need            how much data, where that was measured
    price_per_hour  of this machine, where the recipe says one
    """

    estimate: Estimate
    need: Need | None = None
    price_per_hour: float | None = None

    @property
    def fits(self) -> bool:
        return self.estimate.fits

    def to_json(self) -> dict[str, Any]:
        """The contract's plan.json, before the run."""
        predicted = {**asdict(self.estimate), "money": self.money(self.estimate.seconds)}
        facts = {"predicted": predicted, "fits": self.fits}
        return facts if self.need is None else {**facts, "data_need": self.need.to_json()}

    @classmethod
    def from_json(cls, facts: dict[str, Any], price_per_hour: float | None) -> Plan:
        """What `to_json` gave of a plan without a data need."""
        predicted = {key: value for key, value in facts["predicted"].items() if key != "money"}
        return cls(Estimate(**predicted), price_per_hour=price_per_hour)

    def money(self, seconds: float) -> float | None:
        """What so long costs, in the currency of the price."""
        return None if self.price_per_hour is None else seconds / 3600 * self.price_per_hour

    def sentence(self) -> str:
        """`plan: 60 steps, 78,000 tokens (61,000 computed), about 5 min, 2.1 GB`."""
        e, money = self.estimate, self.money(self.estimate.seconds)
        return (
            f"plan: {e.steps:,} steps, {e.tokens:,} tokens ({e.computed_tokens:,} computed, "
            f"{e.supervised_tokens:,} trained), "
            f"about {_minutes(e.seconds)} of training, {e.peak_bytes / 1e9:.1f} GB at most"
            + (f" in each of {e.workers} workers" if e.workers > 1 else "")
            + ("" if money is None else f", {money:.2f} at {self.price_per_hour:g} an hour")
        )

    def refusal(self) -> str:
        """Why it can't be run here, and what would."""
        e = self.estimate
        return (
            f"training would take {e.peak_bytes / 1e9:.1f} GB and {e.memory_limit / 1e9:.1f} GB may be used"
            f"{f' in each of {e.workers} workers' if e.workers > 1 else ''}; "
            "raise runtime.memory_limit, lower data.max_seq_len, or train a smaller adapter"
        )

    def render(self) -> str:
        """For the terminal."""
        said = [self.sentence()] if self.fits else [self.sentence(), f"it does not fit: {self.refusal()}"]
        return "\n".join([*said, *(self.need.sentences() if self.need is not None else ())])


def record_actual(run: Run, plan: Plan, before: float = 0.0) -> None:
    """Add what the run took to plan.json: summed over its steps, and `before` seconds of what a loss compares with."""
    steps = [row for row in read_metrics(run) if "loss" in row]
    seconds = before + _total(steps, "seconds")
    actual = {
        "steps": len(steps),
        "tokens": _total(steps, "tokens"),
        "computed_tokens": _total(steps, "computed_tokens"),
        "supervised_tokens": _total(steps, "supervised_tokens"),
        "seconds": seconds,
        "peak_bytes": max((row["peak_memory_bytes"] for row in steps), default=0),
        "money": plan.money(seconds),
    }
    write_json(run.plan, {**plan.to_json(), "actual": actual})


def _total(rows: Sequence[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
