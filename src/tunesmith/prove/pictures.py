"""The pictures of the page as SVG: a few shapes each; the style sheet colours them, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 960
ROW = 40
LABELS = 210  # room for contender names on the left
LONGEST_NAME = 24  # characters that fit there; an endpoint's URL does not
VALUES = 230  # room for numbers on the right


@dataclass(frozen=True, slots=True)
class Rung:
    """A line of the ladder: a score from 0 to 1 with its interval. `tone` is a class of the style sheet."""

    name: str
    mean: float | None
    low: float
    high: float
    note: str
    tone: str


def ladder(rungs: Sequence[Rung], heading: str) -> Markup:
    """Dots with interval bars on a scale from 0 to 100, the contenders one under the other."""
    height = 34 + ROW * len(rungs) + 6
    parts = [_open(WIDTH, height, heading, _described(rungs))]
    for tick in range(0, 101, 20):
        x = _x(tick / 100)
        parts.append(_line("grid", x, 24, x, height - 8))
        parts.append(_text("tick", x, 14, str(tick), "middle"))
    for place, rung in enumerate(rungs):
        parts.append(_rung(rung, 34 + ROW * place + ROW / 2))
    return Markup("").join([*parts, Markup("</svg>")])


def curve(series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], heading: str, unit: str) -> Markup:
    """Lines over training steps: (name, tone, points). Empty where there are fewer than two points."""
    points = [point for _, _, line in series for point in line if math.isfinite(point[1])]
    if len({x for x, _ in points}) < 2:
        return Markup("")
    left, right, top, bottom = 56, WIDTH - 150, 18, 250
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    highest = max(y for _, y in points)
    ticks = _ticks(highest)
    scale = ticks[-1] or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - low_x) / (high_x - low_x) * (right - left), bottom - y / scale * (bottom - top)

    parts = [_open(WIDTH, bottom + 40, heading, f"{heading}: {', '.join(name for name, _, _ in series)} over steps")]
    for tick in ticks:
        y = place(low_x, tick)[1]
        parts.append(_line("grid", left, y, right, y))
        parts.append(_text("tick", left - 10, y + 4, f"{tick:g}", "end"))
    parts.append(_text("tick", left, bottom + 24, f"{low_x:g}", "start"))
    parts.append(_text("tick", right, bottom + 24, f"{unit} {high_x:g}", "end"))
    last_label = -math.inf
    for name, tone, line in series:
        places = [place(x, min(y, scale)) for x, y in line if math.isfinite(y)]
        if not places:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(tone, path))
        x, y = places[-1]
        parts.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(tone, x, y))
        label_y = max(y + 4, last_label + 18)
        last_label = label_y
        parts.append(_text(f"label {tone}", right + 12, label_y, name, "start"))
    return Markup("").join([*parts, Markup("</svg>")])


def difference(mean: float, low: float, high: float, reach: float) -> Markup:
    """A small interval on a scale from -reach to +reach, for a table cell."""

    def x(value: float) -> float:
        return 60 + max(-1.0, min(1.0, value / reach)) * 56

    tone = "worse" if high < 0 else "better" if low > 0 else "even"
    return Markup(
        '<svg class="mini" viewBox="0 0 120 16" role="presentation"><line class="grid" x1="60" y1="1" x2="60" y2="15"/>'
        '<line class="bar {0}" x1="{1:.1f}" y1="8" x2="{2:.1f}" y2="8"/>'
        '<circle class="dot {0}" cx="{3:.1f}" cy="8" r="3.5"/></svg>'
    ).format(tone, x(low), x(high), x(mean))


def _rung(rung: Rung, y: float) -> Markup:
    shown = rung.name if len(rung.name) <= LONGEST_NAME else rung.name[: LONGEST_NAME - 1] + "…"
    name = _text(f"name {rung.tone}", LABELS - 18, y + 5, shown, "end")
    if rung.mean is None:
        return name + _text("note", LABELS, y + 5, rung.note or "nothing could be scored", "start")
    low, mean, high = _x(rung.low), _x(rung.mean), _x(rung.high)
    return Markup("").join(
        [
            name,
            _line(f"bar {rung.tone}", low, y, high, y),
            _line(f"cap {rung.tone}", low, y - 5, low, y + 5),
            _line(f"cap {rung.tone}", high, y - 5, high, y + 5),
            Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="6"/>').format(rung.tone, mean, y),
            _text(f"value {rung.tone}", WIDTH - VALUES + 24, y + 5, f"{100 * rung.mean:.1f}", "start"),
            _text("note", WIDTH - VALUES + 78, y + 5, rung.note, "start"),
        ]
    )


def _described(rungs: Sequence[Rung]) -> str:
    """What a screen reader says for the picture."""
    return "; ".join(
        f"{rung.name} {100 * rung.mean:.1f} ({100 * rung.low:.1f} to {100 * rung.high:.1f})"
        for rung in rungs
        if rung.mean is not None
    )


def _x(share: float) -> float:
    return LABELS + share * (WIDTH - VALUES - LABELS)


def _ticks(highest: float) -> list[float]:
    """0 to just above the highest value in four or five round steps."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    return [round(step * i, 10) for i in range(math.ceil(highest / step) + 1)]


def _open(width: float, height: float, heading: str, described: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>').format(
        round(width), round(height), described, heading
    )


def _line(tone: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(tone, x1, y1, x2, y2)


def _text(tone: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        tone, x, y, anchor, escape(text)
    )
