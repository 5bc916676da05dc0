"""Would more data help, and how much? What was measured on growing shares of it, and the answer in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tunesmith.errors import InputError
from tunesmith.prove.power_law import Estimate, PowerLaw, fit

MULTIPLES = (2, 4)  # of the rows there are, that something is said about
NOTICEABLE_SCORE = 0.02
NOTICEABLE_LOSS = 0.05  # of the loss itself
SURE = 0.9
POINTS_DRAWN = 40
Answer = Literal["helps", "hardly", "unknown"]


@dataclass(frozen=True)
class Measured:
    """One quantity on every share: the held-out loss, or the main scorer's mean. `law` is of what more rows lessen."""

    name: str
    is_loss: bool
    items: int  # held-out rows it was measured on
    points: tuple[float, ...]  # [shares]
    errors: tuple[float, ...]  # standard errors, [shares]
    law: PowerLaw

    def at(self, rows: float) -> Estimate:
        """What is expected with so many rows, as the quantity itself."""
        found = self.law.at(rows)
        if self.is_loss:
            return found
        expected, low, high = (min(1.0, max(0.0, 1 - each)) for each in (found.expected, found.high, found.low))
        return Estimate(expected, low, high)

    def answer(self, rows: int) -> Answer:
        """Whether four times the rows surely make a difference worth having, or surely don't."""
        least = NOTICEABLE_LOSS * self.law.at(rows).expected if self.is_loss else NOTICEABLE_SCORE
        chance = self.law.chance_of_gain(rows, MULTIPLES[-1] * rows, least)
        if not self.law.fits or 1 - SURE < chance < SURE:
            return "unknown"
        return "helps" if chance >= SURE else "hardly"

    def sentence(self, rows: int) -> str:
        """`more rows would help field F1: with 2,000 examples expect 78% (71 to 84); …`."""
        if not self.law.fits:
            return f"how {self.name} changes with more rows can't be told: the measured shares lie on no power law"
        start = {
            "helps": f"more rows would help {self.name}",
            "hardly": f"more rows would hardly help {self.name}",
            "unknown": f"whether more rows would help {self.name} can't be told from this",
        }[self.answer(rows)]
        expected = "; ".join(f"with {n * rows:,} examples expect {self._said(self.at(n * rows))}" for n in MULTIPLES)
        return f"{start}: {expected}; with the {rows:,} there are, {self._said(self.at(rows))}"

    def _said(self, found: Estimate) -> str:
        if self.is_loss:
            return f"{found.expected:.3f} ({found.low:.3f} to {found.high:.3f})"
        return f"{100 * found.expected:.0f}% ({100 * found.low:.0f} to {100 * found.high:.0f})"


def measured(name: str, shares: Sequence[int], values: npt.NDArray[np.float64], *, is_loss: bool) -> Measured:
    """From each held-out item's loss or score under each share. values [items, shares]"""
    lessened = values if is_loss else 1 - values
    covariance = np.cov(lessened.T) / len(values)
    faultless = 0.5 / len(values)  # no fault seen is less than one in as many items, not none
    law = fit(shares, np.maximum(lessened.mean(0), faultless).tolist(), covariance)
    errors = np.sqrt(np.diag(covariance))
    return Measured(name, is_loss, len(values), tuple(values.mean(0).tolist()), tuple(errors.tolist()), law)


@dataclass(frozen=True)
class Need:
    """How held-out rows fare after training on growing shares of the others, and what follows.

    rows    that there are to train on
    shares  of them that were trained on, the largest last; `steps` updates each
    """

    rows: int
    shares: tuple[int, ...]
    steps: int
    seconds: float
    measures: tuple[Measured, ...]  # the one that matters most first

    def sentences(self) -> list[str]:
        """The answer, one sentence a measure."""
        return [measure.sentence(self.rows) for measure in self.measures]

    def to_json(self) -> dict[str, Any]:
        """The shares as measured, and for each measure the answer and what is expected with more rows."""
        return {
            "rows": self.rows,
            "shares": list(self.shares),
            "steps": self.steps,
            "seconds": self.seconds,
            "measures": [
                {
                    "name": each.name,
                    "items": each.items,
                    "points": list(each.points),
                    "standard_errors": list(each.errors),
                    "fits": each.law.fits,
                    "answer": each.answer(self.rows),
                    "sentence": each.sentence(self.rows),
                    "expected": [{"rows": n * self.rows, **asdict(each.at(n * self.rows))} for n in (1, *MULTIPLES)],
                }
                for each in self.measures
            ],
        }

    def picture(self) -> dict[str, Any]:
        """A Vega-Lite specification: what was measured, and the law with its interval, over the number of rows."""
        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "vconcat": [self._panel(each) for each in self.measures],
        }

    def _panel(self, each: Measured) -> dict[str, Any]:
        ends = np.geomspace(self.shares[0], MULTIPLES[-1] * self.rows, POINTS_DRAWN)
        curve = [{"rows": float(n), **asdict(each.at(n))} for n in ends]
        points = [
            {"rows": n, "value": value, "low": value - 1.96 * error, "high": value + 1.96 * error}
            for n, value, error in zip(self.shares, each.points, each.errors, strict=True)
        ]
        x = {"field": "rows", "type": "quantitative", "scale": {"type": "log"}, "title": "rows trained on"}
        format = ".2f" if each.is_loss else ".0%"

        def y(field: str) -> dict[str, Any]:
            axis = {"format": format, "title": each.name}
            return {"field": field, "type": "quantitative", "scale": {"zero": False}, "axis": axis}

        bars = {"y": y("low"), "y2": {"field": "high"}}
        there = {"data": {"values": [{"rows": self.rows}]}, "mark": {"type": "rule", "strokeDash": [4, 4]}}
        return {
            "title": f"{each.name}, with 95% intervals; dashed: the {self.rows:,} rows there are",
            "width": 560,
            "height": 260,
            "layer": [
                {"data": {"values": curve}, "mark": {"type": "area", "opacity": 0.2}, "encoding": {"x": x, **bars}},
                {"data": {"values": curve}, "mark": "line", "encoding": {"x": x, "y": y("expected")}},
                {"data": {"values": points}, "mark": "rule", "encoding": {"x": x, **bars}},
                {
                    "data": {"values": points},
                    "mark": {"type": "point", "filled": True},
                    "encoding": {"x": x, "y": y("value")},
                },
                {**there, "encoding": {"x": x}},
            ],
        }


def write_picture(need: Need, path: Path) -> None:
    """The picture as .svg or .png. Raises InputError."""
    refuse_picture(path)
    import vl_convert

    if path.suffix == ".svg":
        path.write_text(vl_convert.vegalite_to_svg(need.picture()), encoding="utf-8")
    else:
        path.write_bytes(vl_convert.vegalite_to_png(need.picture(), scale=2))


def refuse_picture(path: Path) -> None:
    """Raise InputError where a picture can't be written to this path; to be asked before the work is done."""
    if path.suffix not in (".svg", ".png"):
        raise InputError("a picture is written as .svg or .png; name it so", file=path)
    if path.exists():
        raise InputError("there is something here already; name a new file", file=path)
    if not path.parent.is_dir():
        raise InputError("there is no such folder to write the picture to; make it first", file=path)
