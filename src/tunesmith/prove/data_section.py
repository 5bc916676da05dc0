"""The report's section on the data: what the gate found, how long and how mixed the rows are, and a few of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tunesmith.data.look import pictures
from tunesmith.data.wording import printable

WIDTH = 420
LABELS_DRAWN = 20
QUIET, FAINT = "#888888", "#dddddd"  # the style sheet turns these, and the bars' colours, into its own
CONFIG = {
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 12,
        "labelLimit": 240,
        "labelColor": QUIET,
        "titleColor": QUIET,
        "titleFontWeight": "normal",
        "gridColor": FAINT,
        "domainColor": FAINT,
        "tickColor": FAINT,
    },
    "legend": {"labelColor": QUIET, "labelFontSize": 12, "orient": "top"},
}


def data_section(report: Mapping[str, Any]) -> dict[str, Any]:
    """What data.html.jinja shows of a data_report.json, which may be an empty one."""
    shapes = report.get("shapes", {})
    labels = [{**bar, "label": printable(bar["label"])} for bar in shapes.get("labels", [])]
    if len(names := dict.fromkeys(bar["label"] for bar in labels)) > LABELS_DRAWN:
        total = {name: sum(bar["rows"] for bar in labels if bar["label"] == name) for name in names}
        largest = sorted(names, key=lambda name: -total[name])[:LABELS_DRAWN]
        labels = [bar for bar in labels if bar["label"] in largest]
    return {
        "counts": report.get("counts", {}),
        "findings": report.get("findings", []),
        "pictures": {title: _svg(spec) for title, spec in pictures({**shapes, "labels": labels}).items()},
        "labels_left_out": max(0, len(names) - LABELS_DRAWN),
        "clusters": shapes.get("clusters", []),
        "rows": shapes.get("rows", []),
    }


def _svg(spec: dict[str, Any]) -> Markup:
    """A Vega-Lite specification as SVG. Vega escapes what comes from data; control characters would abort it."""
    import vl_convert

    return Markup(vl_convert.vegalite_to_svg({**spec, "width": WIDTH, "config": CONFIG}))
