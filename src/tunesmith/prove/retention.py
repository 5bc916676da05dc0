"""What the tune did to general behaviour: the base against the tuned model on prompts that have nothing to do with it.

The 200 prompts (data/general_prompts.jsonl) and the prose (data/prose.txt) were written for this product.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.engine.completer import PromptRenderer
from tunesmith.engine.request import Answer, Request
from tunesmith.progress import Reporter
from tunesmith.prove.answering import Weights
from tunesmith.prove.statistics import mean_interval
from tunesmith.types import Interval, Message

DATA = Path(__file__).parent / "data"
PROMPTS = 24  # of the 200, spread over the topics
ANSWER_TOKENS = 48
PROSE_OPENING = 8  # tokens of a paragraph that are given, not predicted
# Tunes of one narrow task that do it well lie at 0.6 to 2.1 nats and 1.4 to 2.0 times (docs/LOG.md).
MOVED_DRIFT, LOST_DRIFT = 1.5, 3.0  # nats a token: the base's words are 4.5 and 20 times less likely
MOVED_RATIO, LOST_RATIO = 1.5, 3.0  # of perplexities


@dataclass(frozen=True, slots=True)
class PromptDrift:
    """One general prompt. Lengths in tokens, at most 48; repetition is the share of 3-grams seen before."""

    prompt: str  # its id
    drift: float  # nats a token
    base_tokens: int
    tuned_tokens: int
    base_stopped: bool
    tuned_stopped: bool
    base_repetition: float
    tuned_repetition: float
    base_answer: str
    tuned_answer: str


@dataclass(frozen=True, slots=True)
class ProseLoss:
    """Mean negative log-probability of a paragraph's tokens, in nats."""

    tokens: int
    base: float
    tuned: float


@dataclass(frozen=True, slots=True)
class Measurements:
    """All that `summarise` needs; kept in items.jsonl."""

    prompts: tuple[PromptDrift, ...]
    prose: tuple[ProseLoss, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Measurements:
        return cls(
            tuple(PromptDrift(**each) for each in content["prompts"]),
            tuple(ProseLoss(**each) for each in content["prose"]),
        )


def measure_retention(
    base: Weights,
    tuned: Weights,
    *,
    prompts: int = PROMPTS,
    reporter: Reporter | None = None,
) -> Measurements:
    """Ask base and tuned model `prompts` general questions, and read them prose.

    drift = mean over the tokens of the base's own greedy answer of log p_base - log p_tuned.
    """
    reporter = reporter or Reporter()
    renderer = base.engine.renderer
    chosen = _spread(_general_prompts(), prompts)
    asked = [_prompt_ids(renderer, text) for _, text in chosen]
    base_answers = _answers(base, asked)
    reporter.advance(1, 4, "the base answers")
    tuned_answers = _answers(tuned, asked)
    reporter.advance(2, 4, "the tuned model answers")
    drifts = tuple(
        _prompt_drift(prompt_id, ids, before, after, base, tuned)
        for (prompt_id, _), ids, before, after in zip(chosen, asked, base_answers, tuned_answers, strict=True)
    )
    reporter.advance(3, 4, "drift")
    prose = tuple(_prose_loss(base, tuned, renderer.completion_prompt_ids(paragraph)) for paragraph in _prose())
    reporter.advance(4, 4, "prose")
    return Measurements(drifts, prose)


def summarise(measured: Measurements) -> dict[str, Any]:
    """The report's `retention`: means with intervals, thresholds, and what became of general behaviour.

    Moved or lost: the interval of drift, or of the perplexity ratio, lies wholly above the threshold of that name. Kept
    means not lost; `reasons` say what was.
    """
    prompts, prose = measured.prompts, measured.prose
    drift = mean_interval([each.drift for each in prompts])
    log_ratio = mean_interval([each.tuned - each.base for each in prose])
    ratio = Interval(*_exponentiated(log_ratio), log_ratio.n)
    reasons = _above(drift, ratio, LOST_DRIFT, LOST_RATIO)
    tokens = sum(each.tokens for each in prose)
    return {
        "prompts": len(prompts),
        "drift": asdict(drift),
        "perplexity": {
            "base": math.exp(sum(each.base * each.tokens for each in prose) / tokens),
            "tuned": math.exp(sum(each.tuned * each.tokens for each in prose) / tokens),
            "ratio": asdict(ratio),
            "tokens": tokens,
        },
        "length": {which: _mean([getattr(each, f"{which}_tokens") for each in prompts]) for which in WHICH},
        "stop_rate": {which: _mean([getattr(each, f"{which}_stopped") for each in prompts]) for which in WHICH},
        "repetition": {which: _mean([getattr(each, f"{which}_repetition") for each in prompts]) for which in WHICH},
        "thresholds": {
            "drift": LOST_DRIFT,
            "perplexity_ratio": LOST_RATIO,
            "moved_drift": MOVED_DRIFT,
            "moved_perplexity_ratio": MOVED_RATIO,
        },
        "kept": not reasons,
        "reasons": reasons,
        "moved": _above(drift, ratio, MOVED_DRIFT, MOVED_RATIO),
    }


def _above(drift: Interval, ratio: Interval, highest_drift: float, highest_ratio: float) -> list[str]:
    """What lies above its threshold by its whole interval, in words."""
    found = []
    if drift.ci[0] > highest_drift:
        found.append(f"drift {drift.mean:.2f} nats a token, above {highest_drift}")
    if ratio.ci[0] > highest_ratio:
        found.append(f"perplexity of prose {ratio.mean:.2f} times the base's, above {highest_ratio}")
    return found


WHICH = ("base", "tuned")


def general_prompt(prompt_id: str) -> str:
    """The text of a general prompt."""
    return dict(_general_prompts())[prompt_id]


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """The share of n-grams that stood earlier in the same answer: 0 for fresh text, near 1 for a loop."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _answers(weights: Weights, prompts: Sequence[list[int]]) -> list[Answer]:
    asked = [Request(prompt_ids=ids, adapter=weights.adapter, max_tokens=ANSWER_TOKENS) for ids in prompts]
    return weights.engine.generate(asked)


def _prompt_drift(
    prompt: str, ids: list[int], before: Answer, after: Answer, base: Weights, tuned: Weights
) -> PromptDrift:
    said = list(before.ids)
    drift = (_mean_logprob(base, ids, said) - _mean_logprob(tuned, ids, said)) if said else 0.0
    return PromptDrift(
        prompt=prompt,
        drift=drift,
        base_tokens=len(before.ids),
        tuned_tokens=len(after.ids),
        base_stopped=before.finish_reason == "stop",
        tuned_stopped=after.finish_reason == "stop",
        base_repetition=repetition(before.ids),
        tuned_repetition=repetition(after.ids),
        base_answer=before.text,
        tuned_answer=after.text,
    )


def _prose_loss(base: Weights, tuned: Weights, ids: list[int]) -> ProseLoss:
    given, read = ids[:PROSE_OPENING], ids[PROSE_OPENING:]
    return ProseLoss(len(read), -_mean_logprob(base, given, read), -_mean_logprob(tuned, given, read))


def _mean_logprob(weights: Weights, prompt_ids: list[int], answer_ids: list[int]) -> float:
    logprobs = weights.engine.logprobs(prompt_ids, answer_ids, adapter=weights.adapter)
    return float(sum(logprobs)) / len(answer_ids)


def _prompt_ids(renderer: PromptRenderer, text: str) -> list[int]:
    message: Message = {"role": "user", "content": text}
    return renderer.prompt_ids([message]) if renderer.has_template else renderer.completion_prompt_ids(text)


def _general_prompts() -> list[tuple[str, str]]:
    """(id, prompt), 20 topics of 10."""
    text = (DATA / "general_prompts.jsonl").read_text(encoding="utf-8")
    return [(row["id"], row["prompt"]) for row in map(json.loads, text.splitlines())]


def _prose() -> list[str]:
    text = (DATA / "prose.txt").read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


def _spread(prompts: Sequence[tuple[str, str]], n: int) -> list[tuple[str, str]]:
    """`n` of them, evenly over the list; a step that shares no factor with 10 also varies the place in the topic."""
    n = min(n, len(prompts))
    return [prompts[i * len(prompts) // n] for i in range(n)]


def _exponentiated(interval: Interval) -> tuple[float, tuple[float, float]]:
    return math.exp(interval.mean), (math.exp(interval.ci[0]), math.exp(interval.ci[1]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
