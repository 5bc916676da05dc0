"""Whether a tune makes a long prompt needless: as good within a margin, at fewer tokens, and when that has paid.

Not worse, and equivalent, within a margin d: the 95% interval of the paired difference tuned - prompt lies above -d,
and inside -d to d (Schuirmann 1987, two one-sided tests; at 95% stricter than their 5%). Where all differences are
equal that interval has no width, and the rule of three gives it one: what was seen in none of n items may still hold
for 3 / n of all (Hanley and Lippman-Hand 1983).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.prove.measures import Paired, Result
from tunesmith.prove.verdict import FEWEST_ITEMS, USEFUL, Verdict, find_pair, lost, points, span, title


@dataclass(frozen=True, slots=True)
class Compression:
    """The tune against the base with the prompt. `margin` is of a score from 0 to 1."""

    prompt: Result
    tuned: Result
    pair: Paired
    margin: float
    break_even_calls: int | None

    @property
    def not_worse(self) -> bool:
        return self.pair.ci[0] >= -self.margin

    @property
    def equivalent(self) -> bool:
        return self.not_worse and self.pair.ci[1] <= self.margin

    @property
    def tokens_saved(self) -> float:
        """Prompt tokens a call."""
        return self.prompt.prompt_tokens_mean - self.tuned.prompt_tokens_mean

    def to_json(self) -> dict[str, Any]:
        """The report's `compression`."""
        return {
            "prompt_tokens": {"prompt": self.prompt.prompt_tokens_mean, "tuned": self.tuned.prompt_tokens_mean},
            "tokens_saved_per_call": self.tokens_saved,
            "margin": self.margin,
            "diff": self.pair.diff,
            "ci": list(self.pair.ci),
            "n": self.pair.n,
            "not_worse": self.not_worse,
            "equivalent": self.equivalent,
            "break_even_calls": self.break_even_calls,
        }

    def decide(self, scorer: str, retention: Mapping[str, Any] | None) -> Verdict:
        """The verdict's words, by rules of their own: here a tune that is merely as good has done its work."""
        within = f"{points(self.margin)} points"
        between = f"tuned differs from the prompted base by {span(self.pair)}"
        if self.pair.groups < FEWEST_ITEMS:
            few = f"{self.pair.groups} independent held-out items are too few to compare"
            return Verdict("too-few-items", f"{few}; hold out at least {FEWEST_ITEMS}", None)
        if max(each.scores[scorer].mean for each in (self.prompt, self.tuned)) < USEFUL:
            reached = f"{points(self.prompt.scores[scorer].mean)} points of {title(scorer)}"
            return Verdict("hold", f"the prompt itself does not do the job: it reaches {reached}", None)
        if self.pair.ci[1] < -self.margin:
            return Verdict("prompt", f"{between}: worse than the margin of {within}; keep the prompt", "prompt")
        if not self.not_worse:
            return Verdict(
                "hold", f"{between}: {within} behind can't be ruled out; hold out more rows, or train longer", None
            )
        if retention is not None and not retention["kept"]:
            return Verdict("hold", f"{between}, but {lost(retention)}", None)
        return Verdict("ship", f"{between}: {self._standing(within)}, {self._savings()}", "tuned")

    def _standing(self, within: str) -> str:
        if self.equivalent:
            return f"equivalent within {within}"
        return "better" if self.pair.ci[0] > 0 else f"not worse by {within}"

    def _savings(self) -> str:
        before, now = self.prompt.prompt_tokens_mean, self.tuned.prompt_tokens_mean
        tokens = f"at {now:.0f} prompt tokens a call instead of {before:.0f}"
        if self.break_even_calls is None:
            return f"{tokens}; a call is no faster here, so tokens are what is saved"
        return f"{tokens}; training has paid for itself after {self.break_even_calls:,} calls"


def compare_with_prompt(
    results: Sequence[Result], pairs: Sequence[Paired], scorer: str, margin: float, seconds: float | None
) -> Compression | None:
    """`tuned` against `prompt`; None where one of them was not asked, or nothing could be scored."""
    by_name = {each.name: each for each in results if each.scores[scorer].n}
    pair = find_pair(pairs, "tuned", "prompt")
    if pair is None or not {"tuned", "prompt"} <= by_name.keys():
        return None
    prompt, tuned = by_name["prompt"], by_name["tuned"]
    if pair.ci[0] == pair.ci[1]:
        unseen = 3 / max(1, pair.groups)
        pair = replace(pair, ci=(max(-1.0, pair.diff - unseen), min(1.0, pair.diff + unseen)))
    return Compression(prompt, tuned, pair, margin, break_even_calls(seconds, prompt, tuned))


def break_even_calls(training_seconds: float | None, other: Result, tuned: Result) -> int | None:
    """Training seconds / (the other's seconds a call - the tuned model's); None where that is never."""
    saved = other.seconds_per_item - tuned.seconds_per_item
    return round(training_seconds / saved) if training_seconds is not None and saved > 0 else None
