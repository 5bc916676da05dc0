"""Show an example as the model sees it: what is trained in colour, what is only read in grey."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

TRAINED, READ = "bold green", "dim"


def coloured(pieces: Sequence[str], weights: Sequence[float]) -> Text:
    """Pieces of text, one a token, coloured by their loss weights; spans of equal weight share one style."""
    text = Text()
    for trained, span in groupby(zip(pieces, weights, strict=True), key=lambda pair: pair[1] > 0):
        text.append("".join(piece for piece, _ in span), style=TRAINED if trained else READ)
    return text
