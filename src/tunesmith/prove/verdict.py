"""The verdict: fixed rules from measured differences to one of five decisions. docs/PROOF.md states them in full.

"Tuned arm" is a contender with the adapter, "alternative" any other that runs on the same base; the best alternative
is the one with the highest mean, so the tune has to beat the strongest of them. In this order:

1  too-few-items   fewer than 20 independent items
2  hold            neither reaches 10 points: nobody does the job
3  ship            better than the best alternative: interval above 0, Holm-corrected p below 5%, 2 points or more;
   hold            but answers are missing, an earlier adapter is not beaten, or general behaviour was lost
4  prompt|retrieve the best alternative is better, or the tune surely gains less than 5 points (hold for a classifier)
5  too-few-items   undecided, and nothing under 15 points could have been seen
6  hold            undecided otherwise
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tunesmith.prove.measures import Paired, Result

FEWEST_ITEMS = 20
COARSEST = 0.15  # minimum detectable effect above which an undecided comparison had too few items
USEFUL = 0.10
SMALL_GAIN = 0.05
WORTHWHILE = 0.02
LEVEL = 0.05
MOST_UNANSWERED = 0.05

Decision = Literal["ship", "prompt", "retrieve", "hold", "too-few-items"]
SCORER_TITLES = {
    "json_fields": "field F1",
    "json_exact": "exact JSON",
    "json_valid": "valid JSON",
    "json_schema": "schema-valid JSON",
    "label": "accuracy",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "judge_agreement": "judge agreement",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, why in one sentence, and which contender to use (None where none is recommended)."""

    decision: Decision
    reason: str
    winner: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def title(scorer: str) -> str:
    """A scorer's name as a sentence says it."""
    return SCORER_TITLES.get(scorer, scorer)


def points(value: float) -> str:
    """0.123 -> "12.3": scores are shown out of 100."""
    return f"{100 * value:.1f}"


def decide(
    results: Sequence[Result], pairs: Sequence[Paired], scorer: str, retention: Mapping[str, Any] | None
) -> Verdict:
    """Apply the rules. `retention` is the report's section, None where it was not measured."""
    scored = [each for each in results if each.scores[scorer].n]
    whole = [each for each in scored if each.unanswered <= MOST_UNANSWERED * each.items]
    alternative = _best([each for each in whole if each.kind in ("prompt", "retrieval", "classifier")], scorer)
    tuned = _best_tuned([each for each in scored if each.kind == "tuned"], pairs, scorer)
    if tuned is None or alternative is None:
        return _without_comparison(tuned, alternative, scorer)
    pair = find_pair(pairs, tuned.name, alternative.name)
    if pair is None or pair.groups < FEWEST_ITEMS:
        n = 0 if pair is None else pair.groups
        reason = f"{n} independent held-out items are too few to compare; hold out at least {FEWEST_ITEMS}"
        return Verdict("too-few-items", reason, None)
    if max(tuned.scores[scorer].mean, alternative.scores[scorer].mean) < USEFUL:
        best = max((tuned, alternative), key=lambda each: each.scores[scorer].mean)
        reached = f"{points(best.scores[scorer].mean)} points of {title(scorer)}"
        return Verdict("hold", f"no contender does the job: the best, {best.name}, reaches {reached}", None)
    if pair.ci[0] > 0 and pair.p_holm < LEVEL and pair.diff >= WORTHWHILE:
        return _better(tuned, alternative, pair, whole, pairs, scorer, retention)
    if pair.ci[1] < SMALL_GAIN:
        return _not_better(tuned, alternative, pair, pairs)
    return _undecided(tuned, alternative, pair)


def find_pair(pairs: Sequence[Paired], a: str, b: str) -> Paired | None:
    """The comparison a - b, whichever way round it was computed."""
    for pair in pairs:
        if (pair.a, pair.b) == (a, b):
            return pair
        if (pair.b, pair.a) == (a, b):
            return pair.reversed()
    return None


def best_alternative(results: Sequence[Result], scorer: str) -> Result | None:
    """The strongest contender that needs no tuning, on the same base."""
    kinds = ("prompt", "retrieval", "classifier")
    return _best([each for each in results if each.kind in kinds and each.scores[scorer].n], scorer)


def best_tuned(results: Sequence[Result], pairs: Sequence[Paired], scorer: str) -> Result | None:
    """`tuned`, unless another tuned arm is better by its interval."""
    return _best_tuned([each for each in results if each.kind == "tuned" and each.scores[scorer].n], pairs, scorer)


def _better(
    tuned: Result,
    alternative: Result,
    pair: Paired,
    whole: Sequence[Result],
    pairs: Sequence[Paired],
    scorer: str,
    retention: Mapping[str, Any] | None,
) -> Verdict:
    gain = f"{tuned.name} beats the best alternative, {alternative.name}, by {span(pair)}"
    if tuned.unanswered > MOST_UNANSWERED * tuned.items:
        missing = f"{tuned.unanswered} of {tuned.items} items went unanswered"
        return Verdict("hold", f"{gain}, but {missing}", None)
    for earlier in (each for each in whole if each.kind == "previous"):
        against = find_pair(pairs, tuned.name, earlier.name)
        if against is not None and against.ci[0] <= 0 and earlier.scores[scorer].mean >= tuned.scores[scorer].mean:
            return Verdict("hold", f"{gain}, but not the earlier {earlier.name} ({span(against)})", earlier.name)
    if retention is not None and not retention["kept"]:
        return Verdict("hold", f"{gain}, but {lost(retention)}", None)
    leader = _endpoint_ahead(tuned, whole, pairs)
    return Verdict("ship", f"{gain}{leader}{_general(retention)}", tuned.name)


def lost(retention: Mapping[str, Any]) -> str:
    """That general behaviour was lost, and what keeps it."""
    return (
        f"general behaviour was lost: {'; '.join(retention['reasons'])}; a lower train.lr, fewer epochs or data.replay "
        "keep more of it"
    )


def _general(retention: Mapping[str, Any] | None) -> str:
    if retention is None:
        return ""
    if not retention["moved"]:
        return "; general behaviour is kept"
    return f"; use it for this task alone: general behaviour moved ({'; '.join(retention['moved'])})"


def _endpoint_ahead(tuned: Result, whole: Sequence[Result], pairs: Sequence[Paired]) -> str:
    """An endpoint never stops a ship: it is neither cheaper nor yours. Where it leads, the reason says so."""
    for endpoint in (each for each in whole if each.kind == "endpoint"):
        pair = find_pair(pairs, endpoint.name, tuned.name)
        if pair is not None and pair.ci[0] > 0:
            return f"; the endpoint {endpoint.name} is ahead by {span(pair)}"
    return ""


def _not_better(tuned: Result, alternative: Result, pair: Paired, pairs: Sequence[Paired]) -> Verdict:
    if pair.ci[1] < 0:
        reason = f"{alternative.name} beats {tuned.name} by {span(pair.reversed())}"
    else:
        reason = f"{tuned.name} gains less than {SMALL_GAIN * 100:.0f} points over {alternative.name}: {span(pair)}"
    if alternative.kind == "classifier":
        return Verdict("hold", f"{reason}; a classifier that needs no language model does as well", alternative.name)
    decision: Decision = "retrieve" if alternative.kind == "retrieval" else "prompt"
    return Verdict(decision, f"{reason}; tuning does not pay here", alternative.name)


def _undecided(tuned: Result, alternative: Result, pair: Paired) -> Verdict:
    effect = pair.minimum_detectable_effect
    between = f"{tuned.name} against {alternative.name} is undecided at {span(pair)}"
    needed = round(pair.groups * (effect / SMALL_GAIN) ** 2)
    if effect > COARSEST:
        reason = f"{between}; about {needed:,} items would show a difference of {SMALL_GAIN * 100:.0f} points"
        return Verdict("too-few-items", reason, None)
    return Verdict("hold", f"{between}; {pair.groups} items show {points(effect)} points or more", None)


def _without_comparison(tuned: Result | None, alternative: Result | None, scorer: str) -> Verdict:
    only = tuned or alternative
    if only is None:
        return Verdict("too-few-items", "no item could be scored; give the held-out rows their expected answers", None)
    reached = f"{only.name} reaches {points(only.scores[scorer].mean)} points of {title(scorer)}"
    other = "alternative" if tuned is not None else "tuned model"
    return Verdict("hold", f"{reached}, and there is no {other} to compare it with", None)


def _best(results: Sequence[Result], scorer: str) -> Result | None:
    return max(results, key=lambda each: each.scores[scorer].mean, default=None)


def _best_tuned(arms: Sequence[Result], pairs: Sequence[Paired], scorer: str) -> Result | None:
    plain = next((each for each in arms if each.name == "tuned"), None)
    best = _best(arms, scorer)
    if plain is None or best is None or best is plain:
        return best
    pair = find_pair(pairs, best.name, plain.name)
    return best if pair is not None and pair.ci[0] > 0 else plain


def span(pair: Paired) -> str:
    """12.3 points of field F1 (8.0 to 16.5, n = 145)"""
    low, high = pair.ci
    return f"{points(pair.diff)} points of {title(pair.scorer)} ({points(low)} to {points(high)}, n = {pair.n})"
