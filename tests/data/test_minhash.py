"""Near-duplicates are found, and only they, also where all rows share a template."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from tunesmith.data.likeness import likeness, normalise
from tunesmith.data.minhash import cluster, shingle_sets, similarity, split_words
from tunesmith.types import Example, Source


def cluster_of(texts):
    return cluster(shingle_sets(texts))


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def words() -> list[str]:
    chance = random.Random(1)
    return ["".join(chance.choices(LETTERS, k=chance.randint(2, 9))) for _ in range(5_000)]


def texts(words, count, length, seed=0) -> list[str]:
    chance = random.Random(seed)
    weights = [1 / (i + 10) for i in range(len(words))]
    return [" ".join(chance.choices(words, weights, k=length)) for _ in range(count)]


def edited(text, words, edits, seed=0) -> str:
    chance, parts = random.Random(seed), text.split()
    for place in chance.sample(range(len(parts)), edits):
        parts[place] = chance.choice(words)
    return " ".join(parts)


@pytest.mark.parametrize(("length", "edits"), [(12, 1), (30, 2), (60, 4), (200, 10)])
def test_texts_with_a_few_words_changed_share_a_cluster(words, length, edits):
    originals = texts(words, 300, length)
    copies = [edited(text, words, edits, i) for i, text in enumerate(originals[:100])]
    labels = cluster_of(originals + copies)
    assert (labels[:100] == labels[300:]).mean() >= 0.97
    assert len(set(labels[:300].tolist())) == 300


def test_a_shared_template_makes_no_duplicates(words):
    template = " ".join(words[:80])
    labels = cluster_of([f"{template} {text}" for text in texts(words, 300, 8)])
    assert len(set(labels.tolist())) == 300


def test_five_templates_make_no_duplicates(words):
    templates = texts(words, 5, 40, seed=3)
    labels = cluster_of([f"{templates[i % 5]} {text}" for i, text in enumerate(texts(words, 400, 15))])
    assert len(set(labels.tolist())) == 400


def test_estimates_agree_with_sets(words):
    """Against the definition, computed with Python sets: all elements rare, so every weight is 1."""
    originals = texts(words, 40, 25)
    all_texts = originals + [edited(text, words, 5, i) for i, text in enumerate(originals)]
    sets = shingle_sets(all_texts)
    sets.weights = np.ones(2**22, np.float32)

    def elements(text):
        parts = split_words(text)
        return {*parts, *pairwise(parts)}

    left, right = np.arange(40), np.arange(40, 80)
    expected = [
        len(elements(all_texts[a]) & elements(all_texts[b])) / len(elements(all_texts[a]) | elements(all_texts[b]))
        for a, b in zip(left, right, strict=True)
    ]
    np.testing.assert_allclose(similarity(sets, left, right), expected, atol=1e-6)


def test_thousands_of_equal_neighbours_stay_cheap_and_together():
    labels = cluster_of([f"my parcel number {i} has not arrived at the shop in the old town yet" for i in range(3_000)])
    # All rows share everything but a number: what is common to all cannot tell them apart, the number can.
    assert len(set(labels.tolist())) == 3_000


def test_few_and_empty_texts():
    assert cluster_of([]).tolist() == []
    assert cluster_of(["one"]).tolist() == [0]
    assert len(set(cluster_of(["", "a", "?!"]).tolist())) == 3


def test_words_of_any_script():
    assert split_words("it's 3+4.") == ["it", "s", "3", "+", "4"]
    assert split_words("私の名前、ok") == ["私", "の", "名", "前", "、", "ok"]
    assert split_words("naïve café!") == ["naïve", "café"]


def example(user: str, system: str = "", line: int = 1) -> Example:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": user}, {"role": "assistant", "content": "x"}]
    return Example("0", Source("f", line), "chat", messages=tuple(turns))


def test_inputs_are_the_same_but_for_case_width_space_and_end_marks():
    assert normalise("  Where IS\tmy  card?? ") == normalise("where is my card") == normalise("ｗｈｅｒｅ is my card.")
    assert normalise("3+4") != normalise("3-4")


def test_standing_instructions_are_part_of_the_question():
    like = likeness(
        [example("hello", "Be a pirate."), example("hello", "Be a judge."), example("Hello!", "Be a judge")]
    )
    assert like.same.tolist() == [0, 1, 1]
