"""Rows that are probably wrong: labels a simple classifier contradicts, lengths and losses far from all others."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tunesmith.data.likeness import uniform
from tunesmith.data.material import Material, Note
from tunesmith.data.private import quote
from tunesmith.data.tokenize import count_rows

FOLDS = 5
FEWEST_ROWS, FEWEST_OF_A_LABEL = 100, 5
MOST_TRAINED = 8_000  # rows a fold's classifier learns from
WORTH_HEARING = 0.6  # accuracy below which the classifier's opinion says nothing about the labels
FAR = 6.0  # robust standard deviations
ENOUGH = 30


def likely_wrong_label(material: Material) -> Iterator[Note]:
    """Labels that a TF-IDF classifier, trained on the other rows, is confident are another one.

    The rule of confident learning (Northcutt, Jiang, Chuang 2021): a row is suspect when its probability of another
    label is at least the average that rows of that label get, while its own label's is below average by half.
    """
    if material.labels is None or len(material.rows) < FEWEST_ROWS:
        return
    counts = Counter(material.labels)
    names = sorted(label for label, count in counts.items() if count >= FEWEST_OF_A_LABEL)
    numbers = [n for n, label in enumerate(material.labels) if counts[label] >= FEWEST_OF_A_LABEL]
    if len(names) < 2:
        return
    place = {name: i for i, name in enumerate(names)}
    given = np.array([place[material.labels[n]] for n in numbers])
    folds = np.array([int(FOLDS * _fold_key(material, n)) for n in numbers])
    chances = _cross_validated([material.inputs[n] for n in numbers], given, folds, len(names))
    if chances is None or (chances.argmax(1) == given).mean() < WORTH_HEARING:
        return
    usual = np.array([chances[given == label, label].mean() for label in range(len(names))])
    best = chances.argmax(1)
    own = chances[np.arange(len(given)), given]
    suspect = (best != given) & (chances.max(1) >= usual[best]) & (own < 0.5 * usual[given])
    rows = np.flatnonzero(suspect)
    if len(rows):
        sources = material.sources([numbers[row] for row in rows.tolist()])
        worst = int(rows[np.argmax(chances[rows, best[rows]])])
        n = numbers[worst]
        named, likely = names[given[worst]], names[best[worst]]
        reason = (
            f"{count_rows(sources)} whose label a simple classifier disputes, most of all {material.rows[n].source}: "
            f"{quote(material.inputs[n])} is labelled {quote(named)} and looks like {quote(likely)} "
            f"({chances[worst, best[worst]]:.0%})"
        )
        yield Note("likely-wrong-label", "warn", reason, "look at these rows and mend what is wrong", sources)


def _fold_key(material: Material, number: int) -> float:
    """Near-duplicates fall into one fold: a copy of a wrong row would defend it."""
    return uniform(f"fold {material.near[number]}")


def _cross_validated(
    texts: Sequence[str], given: npt.NDArray[np.int64], folds: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.float64] | None:
    """Each row's probability of each label, by a classifier that has not seen it. [rows, labels]"""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    chances = np.zeros((len(texts), count))
    for fold in range(FOLDS):
        inside, outside = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        outside = outside[:: max(1, -(-len(outside) // MOST_TRAINED))]
        if not len(inside) or len(set(given[outside].tolist())) < 2:
            return None
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=20_000, token_pattern=r"\S+")
        learned = words.fit_transform([texts[i][:5_000] for i in outside.tolist()])
        model = LogisticRegression(C=10.0, max_iter=100, tol=1e-3).fit(learned, given[outside])
        asked = words.transform([texts[i][:5_000] for i in inside.tolist()])
        chances[np.ix_(inside, model.classes_)] = model.predict_proba(asked)
    return chances


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
                f"{count_rows(numbers)} whose {what} is far from the usual {usual:,} characters, most of all line "
                f"{material.rows[far].source.line} with {len(texts[far]):,}"
            )
            yield Note(
                "length-outlier", "info", reason, "make sure that these rows are whole", material.sources(numbers)
            )


def loss_outlier(material: Material) -> Iterator[Note]:
    """Answers that surprise the base far more than all others do, where its losses were measured."""
    if material.losses is None:
        return
    measured = [n for n, row in enumerate(material.rows) if row.id in material.losses]
    losses = [material.losses[material.rows[n].id] for n in measured]
    high = [i for i in _outliers(losses) if losses[i] > statistics.median(losses)]
    if high:
        worst = max(high, key=lambda i: losses[i])
        reason = (
            f"{count_rows(high)} whose answer the base finds far less likely than the others', most of all line "
            f"{material.rows[measured[worst]].source.line} (loss {losses[worst]:.2f}, usually "
            f"{statistics.median(losses):.2f})"
        )
        sources = material.sources([measured[i] for i in high])
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
