"""Two runs side by side, item by item where both answered the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.prove.measures import Paired, Prices, Result, all_pairs, by_contender, result
from tunesmith.prove.report import Report
from tunesmith.prove.rows import Row
from tunesmith.prove.terminal import with_interval
from tunesmith.prove.verdict import points, title


@dataclass(frozen=True, slots=True)
class Comparison:
    """For every contender both runs have: each run's result, and the paired difference a - b on common items."""

    a: str
    b: str
    scorer: str
    lines: tuple[tuple[str, Result, Result, Paired | None], ...]
    common_items: int

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "scorer": self.scorer,
            "common_items": self.common_items,
            "contenders": [
                {"name": name, "a": a.to_json(), "b": b.to_json(), "paired": None if pair is None else pair.to_json()}
                for name, a, b, pair in self.lines
            ],
        }

    def render(self) -> Any:
        """A rich table."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold", caption=self._caption())
        for heading in ("contender", self.a, self.b, "difference"):
            table.add_column(heading, justify="left" if heading == "contender" else "right")
        for name, a, b, pair in self.lines:
            difference = "-"
            if pair is not None:
                low, high = pair.ci
                difference = f"{points(pair.diff)} ({points(low)} to {points(high)}), p = {pair.p:.3f}"
            table.add_row(name, with_interval(a.scores[self.scorer]), with_interval(b.scores[self.scorer]), difference)
        return table

    def _caption(self) -> str:
        if self.common_items:
            return f"{title(self.scorer)}; differences on the {self.common_items} items both answered"
        return f"{title(self.scorer)}; the runs share no held-out item, so nothing can be paired"


def compare_reports(a: Report, b: Report, names: tuple[str, str] = ("a", "b")) -> Comparison:
    """Compare two proofs on a's main scorer. An item is the same where its id is (ids are hashes of rows)."""
    scorer = a.scorer if a.scorer in b.results[0].scores else "exact_match"
    first, second = by_contender(a.rows), by_contender(b.rows)
    lines = []
    for name in first:
        if name in second and scorer in first[name][0].scores and scorer in second[name][0].scores:
            pair = _paired(first[name], second[name], names, scorer)
            lines.append((name, result(first[name], _prices(a)), result(second[name], _prices(b)), pair))
    common = {row.item for row in a.rows} & {row.item for row in b.rows}
    return Comparison(*names, scorer, tuple(lines), len(common))


def _paired(a: Sequence[Row], b: Sequence[Row], names: tuple[str, str], scorer: str) -> Paired | None:
    pairs = all_pairs({names[0]: a, names[1] if names[1] != names[0] else f"{names[1]} (2)": b}, scorer)
    return pairs[0] if pairs else None


def _prices(report: Report) -> Prices:
    return Prices(**report.proof["prices"])
