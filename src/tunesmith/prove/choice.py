"""Choosing among variants of a contender on training rows, by a rule fixed beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.prove.answering import ReplyCache
from tunesmith.prove.contender import Prompted
from tunesmith.prove.scorers import Scorer
from tunesmith.prove.scoring import score_answer
from tunesmith.types import Item

LOOKS = (8, 24)  # rows after which variants are compared; at most the last number is ever tried
FALLEN_BEHIND = 0.15  # a variant this far below the best at the first look is dropped


@dataclass(frozen=True, slots=True)
class Choice:
    """What was tried and on how many rows: (variant, mean score, rows)."""

    contender: str
    chosen: str
    tried: tuple[tuple[str, float, int], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "contender": self.contender,
            "chosen": self.chosen,
            "tried": [{"variant": name, "mean": mean, "n": n} for name, mean, n in self.tried],
        }


def choose(
    contender: str,
    variants: Sequence[tuple[str, Prompted]],
    rows: Sequence[Item],
    scorer: Scorer,
    cache: ReplyCache,
) -> Choice:
    """The variant with the highest mean on training rows; the first listed among equals.

    All variants answer 8 rows. Those 0.15 or more behind the best are dropped, as are all but the first where every
    one scores the same; the rest answer 24. They are variants of a prompt to one model, which is asked all at once.
    """
    scores: dict[str, list[float]] = {name: [] for name, _ in variants}
    alive = list(variants)
    for look in LOOKS:
        if len(alive) == 1:
            break
        asked = [(name, row, variant.write(row)) for name, variant in alive for row in rows[len(scores[name]) : look]]
        replies = cache.answer(alive[0][1].model, [prompt for _, _, prompt in asked])
        for (name, item, _), reply in zip(asked, replies, strict=True):
            scored = score_answer([scorer], reply.output, item, failed=reply.error)
            scores[name].append(scored.scores[scorer.name] or 0.0)
        means = {name: _mean(scores[name]) for name, _ in alive}
        best = max(means.values())
        alive = [pair for pair in alive if means[pair[0]] > best - FALLEN_BEHIND]
        if len(set(means.values())) == 1:
            alive = alive[:1]
    chosen = max(alive, key=lambda pair: _mean(scores[pair[0]]))[0]
    return Choice(contender, chosen, tuple((name, _mean(given), len(given)) for name, given in scores.items()))


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0
