"""Two runs side by side as a page, in the report's own dress."""

from __future__ import annotations

from typing import Any

from tunesmith.prove import pictures
from tunesmith.prove.compare import Comparison
from tunesmith.prove.page import fill
from tunesmith.prove.verdict import points
from tunesmith.types import Interval


def render_comparison(comparison: Comparison) -> str:
    """One self-contained page without a script."""
    scorer = comparison.scorer
    reach = max((abs(end) for *_, pair in comparison.lines if pair for end in pair.ci), default=1.0) or 1.0
    rungs: list[pictures.Rung] = []
    lines: list[dict[str, Any]] = []
    for name, a, b, pair in comparison.lines:
        scores = (a.scores[scorer], b.scores[scorer])
        rungs.append(_rung(name, scores[0], "tuned"))
        rungs.append(_rung("", scores[1], "prompt"))  # the second line of the same contender
        picture = pictures.difference(pair.diff, *pair.ci, reach) if pair is not None else ""
        lines.append({"name": name, "scores": scores, "pair": pair, "picture": picture})
    return fill("compare.html.jinja", comparison=comparison, lines=lines, picture=pictures.ladder(rungs, "Both runs"))


def _rung(name: str, score: Interval, tone: str) -> pictures.Rung:
    if not score.n:
        return pictures.Rung(name, None, 0.0, 0.0, "", tone)
    low, high = score.ci
    return pictures.Rung(name, score.mean, low, high, f"{points(low)} – {points(high)}", tone)
