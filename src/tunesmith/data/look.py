"""Ways to look at the data: rows as the model will see them, and pictures of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from tunesmith.chat.display import coloured
from tunesmith.data.private import mask
from tunesmith.data.report import DataReport
from tunesmith.data.tokenize import Rendered, render
from tunesmith.types import Example

if TYPE_CHECKING:
    from tunesmith.chat.renderer import Renderer, TrainOn

SIDES = {"domain": ["train", "held out"], "range": ["#4c78a8", "#f58518"]}


def show_rows(examples: Sequence[Example], renderer: Renderer, n: int, train_on: TrainOn = "assistant") -> Group:
    """The first `n` rows token by token, coloured by what is trained; private data is masked. Raises InputError."""
    parts: list[Text] = []
    for example in examples[:n]:
        for rendered in render(example, renderer, train_on):
            parts.extend(_shown(example, rendered, renderer))
    return Group(*parts)


def _shown(example: Example, rendered: Rendered, renderer: Renderer) -> list[Text]:
    ids, weights = rendered
    trained = sum(weight > 0 for weight in weights)
    head = Text(f"{example.source}: {len(ids):,} tokens, {trained:,} trained", style="bold")
    return [head, coloured(masked_pieces(renderer.pieces(list(ids))), list(weights)), Text()]


def masked_pieces(pieces: Sequence[str]) -> list[str]:
    """The pieces with private data masked, also where it runs over several of them."""
    whole = mask("".join(pieces))
    masked, at = [], 0
    for piece in pieces:
        masked.append(whole[at : at + len(piece)])
        at += len(piece)
    return masked


def pictures(report: DataReport) -> dict[str, dict[str, Any]]:
    """Vega-Lite specifications by title, for the report's page; only those there is something to show in."""
    shapes = report.shapes
    found: dict[str, dict[str, Any]] = {}
    for key, title in (("input_lengths", "Length of the inputs"), ("answer_lengths", "Length of the answers")):
        if shapes.get(key):
            found[title] = _histogram(shapes[key])
    if shapes.get("labels"):
        found["Labels"] = _label_bars(shapes["labels"])
    if shapes.get("clusters"):
        found["Largest clusters of near-duplicates"] = _cluster_bars(shapes["clusters"])
    return found


def _histogram(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return _spec(
        rows,
        {"type": "bar", "opacity": 0.7},
        {
            "x": {"field": "from", "type": "quantitative", "bin": {"binned": True}, "title": "characters"},
            "x2": {"field": "to"},
            "y": {"field": "rows", "type": "quantitative", "stack": True, "title": "rows"},
            "color": {"field": "side", "scale": SIDES, "title": None},
            "tooltip": [{"field": name} for name in ("side", "from", "to", "rows")],
        },
    )


def _label_bars(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return _spec(
        rows,
        {"type": "bar"},
        {
            "y": {"field": "label", "type": "nominal", "sort": "-x", "title": None},
            "x": {"field": "rows", "type": "quantitative", "title": "rows"},
            "color": {"field": "side", "scale": SIDES, "title": None},
            "tooltip": [{"field": name} for name in ("label", "side", "rows")],
        },
    )


def _cluster_bars(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return _spec(
        [{**row, "lines": ", ".join(row["lines"])} for row in rows],
        {"type": "bar", "color": SIDES["range"][0]},
        {
            "y": {"field": "input", "type": "nominal", "sort": "-x", "title": None, "axis": {"labelLimit": 280}},
            "x": {"field": "rows", "type": "quantitative", "title": "rows"},
            "tooltip": [{"field": name} for name in ("input", "rows", "distinct", "answers", "lines")],
        },
    )


def _spec(rows: list[dict[str, Any]], bar: dict[str, Any], encoding: dict[str, Any]) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": rows},
        "mark": bar,
        "encoding": encoding,
        "width": "container",
    }
