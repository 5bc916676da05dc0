"""The main scorer on a few held-out rows while training runs, through the engine with the weights in memory."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.prove.answering import EngineModel, ReplyCache, Weights
from tunesmith.prove.contender import Prompted
from tunesmith.prove.scorers import Scorer
from tunesmith.prove.scoring import score_answer
from tunesmith.prove.wordings import Page
from tunesmith.types import Item


def score_sample(weights: Weights, items: Sequence[Item], scorer: Scorer, *, max_tokens: int) -> list[float]:
    """The weights' score on each of `items`, asked exactly as in training, greedily. Nothing is remembered."""
    model = EngineModel(Weights(weights.engine, weights.adapter), max_tokens)
    tuned = Prompted("tuned", "tuned", model, Page(weights.engine.renderer.has_template).as_trained)
    replies = tuned.answer(items, ReplyCache(None))
    scored = [
        score_answer([scorer], reply.output, item, failed=reply.error).scores[scorer.name]
        for item, reply in zip(items, replies, strict=True)
    ]
    return [score for score in scored if score is not None]
