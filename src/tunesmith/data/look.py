"""Ways to look at the data: rows as the model will see them, and pictures of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from tunesmith.chat.display import coloured
from tunesmith.data.lazy import evenly
from tunesmith.data.private import mask
from tunesmith.data.tokenize import render
from tunesmith.errors import InputError
from tunesmith.types import Example

if TYPE_CHECKING:
    from tunesmith.chat.renderer import Renderer, TrainOn

ROWS_SHOWN, TOKENS_SHOWN = 6, 600
SIDES = {"domain": ["train", "held out"], "range": ["#4c78a8", "#f58518"]}


def show_rows(examples: Sequence[Example], renderer: Renderer, n: int, train_on: TrainOn = "assistant") -> Group:
    """The first `n` rows token by token, coloured by what is trained; private data is masked. Raises InputError."""
    parts: list[Text] = []
    for example in examples[:n]:
        for pieces, weights in _masked(example, renderer, train_on):
            trained = sum(weight > 0 for weight in weights)
            parts.append(Text(f"{example.source}: {len(pieces):,} tokens, {trained:,} trained", style="bold"))
            parts += [coloured(pieces, weights), Text()]
    return Group(*parts)


def token_rows(examples: Sequence[Example], renderer: Renderer, train_on: TrainOn) -> list[dict[str, Any]]:
    """A few rows, evenly chosen, for the report's page: `tokens` are (piece of text, 1 where it is trained)."""
    shown: list[dict[str, Any]] = []
    for example in evenly(examples, ROWS_SHOWN):
        try:
            masked = _masked(example, renderer, train_on)
        except InputError:  # another rule says why
            continue
        for pieces, weights in masked:
            tokens = [[piece, int(weight > 0)] for piece, weight in zip(pieces, weights, strict=True)]
            shown.append({"source": str(example.source), "tokens": tokens[:TOKENS_SHOWN], "of": len(tokens)})
    return shown


def _masked(example: Example, renderer: Renderer, train_on: TrainOn) -> list[tuple[list[str], list[float]]]:
    rendered = render(example, renderer, train_on)
    return [(masked_pieces(renderer.pieces(list(ids))), list(weights)) for ids, weights in rendered]


def masked_pieces(pieces: Sequence[str]) -> list[str]:
    """The pieces with private data masked, also where it runs over several of them."""
    whole = mask("".join(pieces))
    masked, at = [], 0
    for piece in pieces:
        masked.append(whole[at : at + len(piece)])
        at += len(piece)
    return masked


def pictures(shapes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Vega-Lite specifications by title, of a report's `shapes`; only those there is something to show in."""
    found: dict[str, dict[str, Any]] = {}
    for key, title in (("input_lengths", "Length of the inputs"), ("answer_lengths", "Length of the answers")):
        if shapes.get(key):
            found[title] = _histogram(shapes[key])
    if shapes.get("labels"):
        found["Labels"] = _label_bars(shapes["labels"])
    return found


def _histogram(rows: list[dict[str, Any]]) -> dict[str, Any]:
    bars = _spec(
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
    return {**bars, "height": 150}


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


def _spec(rows: list[dict[str, Any]], bar: dict[str, Any], encoding: dict[str, Any]) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": rows},
        "mark": bar,
        "encoding": encoding,
        "width": "container",
    }
