"""TF-IDF and logistic regression: the floor of a label task, trained on the same rows in a second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.prove.answering import Progress, Reply, ReplyCache
from tunesmith.prove.task import question
from tunesmith.types import Item


@dataclass(slots=True)
class Classifier:
    """scikit-learn's TfidfVectorizer (words and pairs of words, sublinear tf) and LogisticRegression (C = 10)."""

    train: Sequence[Item]
    name: str = "tfidf"
    kind: str = "classifier"
    _pipeline: Any = None

    def answer(self, items: Sequence[Item], cache: ReplyCache, progress: Progress | None = None) -> list[Reply]:
        """The most probable label of each item. Fitting costs a second, so nothing is cached."""
        if self._pipeline is None:
            self._pipeline = self._fit()
        began = time.perf_counter()
        labels = self._pipeline.predict([question(item) for item in items])
        seconds = (time.perf_counter() - began) / max(len(items), 1)
        return [Reply(str(label), "stop", 0, 0, seconds) for label in labels]

    def _fit(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        # (?u)\b\w+\b keeps one-letter words, so that no row is left without any term in scripts that have them
        vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        pipeline = make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000))
        rows = [row for row in self.train if row.expected is not None]
        return pipeline.fit([question(row) for row in rows], [(row.expected or "").strip() for row in rows])
