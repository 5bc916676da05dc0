"""Is the held-out part like the training part, and large enough to tell a difference?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tunesmith.data import wording
from tunesmith.data.material import Material, Note
from tunesmith.data.minhash import split_words
from tunesmith.data.private import quote

FEW_ROWS = 50
WANTED_EFFECT = 0.05
POWER = 2.8  # normal quantiles of 97.5% and 80%: 1.96 + 0.84
DISCORDANT = 0.25  # share of items on which two contenders are taken to differ
APART = 0.2  # largest difference of two distribution functions, or of two labels' shares, that is let pass
FEWEST = 20  # rows of a side below which a shift cannot be told from chance
SAMPLED = 2_000  # rows of a side whose words are counted


def few_rows(material: Material) -> Iterator[Note]:
    """Too little to train on, or nothing to prove with."""
    if len(material.train) < FEW_ROWS:
        reason = f"there are {len(material.train)} training rows; a fine-tune seldom pays below a few hundred"
        yield Note("few-rows", "warn", reason, "collect more rows, or try a prompt with examples first")
    if not material.held_out:
        if material.data.held_out == 0:
            reason = "nothing is held out, so nothing can be proved"
            yield Note("nothing-held-out", "info", reason, "set data.held_out to a fraction or a file")
        else:
            reason = "no row could be held out: all rows are near-duplicates of one another, or of one group"
            yield Note("nothing-held-out", "warn", reason, "collect more varied rows, or name a held-out file")


def detectable_effect(material: Material) -> Iterator[Note]:
    """The smallest difference between two contenders that this held-out part would show."""
    inputs = len(set(material.same[len(material.train) :].tolist()))
    if not inputs:
        return
    effect, needed = minimum_detectable_effect(inputs), needed_items(WANTED_EFFECT)
    if effect > WANTED_EFFECT:
        reason = (
            f"{inputs:,} distinct held-out inputs show a difference of {100 * effect:.0f} points between contenders "
            f"with 80% certainty; 5 points need about {needed:,}"
        )
        severity = "warn" if inputs < FEW_ROWS else "info"
        yield Note("detectable-effect", severity, reason, "hold out more rows, or be content with large differences")


def minimum_detectable_effect(items: int) -> float:
    """Smallest true paired difference in a 0/1 score seen at 5% significance with 80% power.

    (z_0.975 + z_0.8) sqrt(d / n), with d the share of items on which the two differ (Connor 1987), here a quarter.
    """
    return min(1.0, POWER * math.sqrt(DISCORDANT / items))


def needed_items(effect: float) -> int:
    return math.ceil(DISCORDANT * (POWER / effect) ** 2)


def label_coverage(material: Material) -> Iterator[Note]:
    """Labels that stand on one side only, or much more often on one."""
    if material.labels is None or not material.held_out:
        return
    train, held_out = Counter(material.labels[: len(material.train)]), Counter(material.labels[len(material.train) :])
    sides = (("held out but never trained on", held_out, train), ("trained on but never held out", train, held_out))
    for side, there, here in sides:
        names = there.keys() - here.keys()
        if names:
            reason = f"{side}: {wording.count(len(names), 'label')}, {', '.join(map(quote, sorted(names)[:5]))}"
            yield Note("label-coverage", "warn", reason, "add rows of them", material.with_labels(names))
    gap = max(abs(train[name] / train.total() - held_out[name] / held_out.total()) for name in train | held_out)
    if gap > APART and held_out.total() >= FEWEST:
        reason = f"a label's share differs by {100 * gap:.0f} points between training and held-out rows"
        yield Note("label-shift", "warn", reason, "draw both from the same source")


def length_shift(material: Material) -> Iterator[Note]:
    """Inputs or answers of quite another length on the held-out side (two-sample Kolmogorov-Smirnov)."""
    from scipy.stats import ks_2samp

    count = len(material.train)
    numbers = _distinct(material)
    for what, texts in (("inputs", material.inputs), ("answers", material.answers)):
        train = sorted(len(texts[n]) for n in numbers if n < count)
        held_out = sorted(len(texts[n]) for n in numbers if n >= count)
        if min(len(train), len(held_out)) < FEWEST:
            continue
        test: Any = ks_2samp(train, held_out, method="asymp")
        if test.statistic > APART and test.pvalue < 1e-3:
            usual = [side[len(side) // 2] for side in (held_out, train)]
            reason = f"held-out {what} have {usual[0]:,} characters by the median, those trained on {usual[1]:,}"
            yield Note("length-shift", "warn", reason, "draw both from the same source")


def vocabulary_shift(material: Material) -> Iterator[Note]:
    """Held-out words that are never trained on, beyond what holding out any rows would give."""
    count, numbers = len(material.train), _distinct(material)
    train = _sampled([material.inputs[n] for n in numbers if n < count])
    held_out = _sampled([material.inputs[n] for n in numbers if n >= count])
    if min(len(train), len(held_out)) < FEWEST:
        return
    # What share of a row's words is new anyway: ask it of as many training rows about the others.
    aside = train[: min(len(held_out), len(train) // 2)]
    usual = _new_words(aside, train[len(aside) :])
    found = _new_words(held_out, train)
    if found > usual + APART:
        reason = f"{found:.0%} of the words in held-out inputs are never trained on; {usual:.0%} would be expected"
        yield Note("vocabulary-shift", "warn", reason, "draw both from the same source")


def _distinct(material: Material) -> list[int]:
    """The first row of each distinct input: copies say nothing new about either side."""
    return sorted(np.unique(material.same, return_index=True)[1].tolist())


def _sampled(texts: Sequence[str]) -> list[list[str]]:
    """The words of at most SAMPLED of the texts, evenly chosen."""
    return [split_words(text[:5_000].lower()) for text in texts[:: max(1, -(-len(texts) // SAMPLED))]]


def _new_words(rows: list[list[str]], others: list[list[str]]) -> float:
    known = {word for row in others for word in row}
    total = sum(map(len, rows))
    return sum(word not in known for row in rows for word in row) / max(1, total)
