"""Scorers: an answer and its held-out row in, a number from 0 to 1 out.

The text and label scorers live here; JSON ones in json_scorers.py, OpenAI's grader objects in graders.py, a model as
judge in judge.py. `choose_scorers` (scoring.py) picks among them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from tunesmith.errors import InputError
from tunesmith.types import Item

Grade = Callable[[str, Item], float]


@dataclass(frozen=True, slots=True)
class Scorer:
    """`grade(output, item)` gives a score in [0, 1] and may raise; a raise is counted as a fault, score 0.

    `needs_expected`: rows without an expected answer can't be scored by it and are counted as such.
    """

    name: str
    about: str  # the formula, one line for the report
    grade: Grade
    needs_expected: bool = True


def expected_of(item: Item) -> str:
    """The expected answer. Scorers that need one are only called where there is one."""
    assert item.expected is not None, f"item {item.id} has no expected answer"
    return item.expected


def exact_match() -> Scorer:
    """1 where the answer equals the expected one, blanks at both ends aside."""
    return Scorer(
        "exact_match",
        "1 if the answer equals the expected one, outer blanks aside",
        lambda output, item: float(output.strip() == expected_of(item).strip()),
    )


def contains() -> Scorer:
    """1 where the expected answer stands somewhere in the answer, upper and lower case alike."""
    return Scorer(
        "contains",
        "1 if the expected answer occurs in the answer, case aside",
        lambda output, item: float(expected_of(item).strip().casefold() in output.casefold()),
    )


def regex(pattern: str, name: str = "regex") -> Scorer:
    """1 where `pattern` (Python `re`, from the recipe, never from data) is found in the answer."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f'prove.scorers: "{pattern}" is not a regular expression ({error})') from None
    return Scorer(
        name,
        f"1 if /{pattern}/ is found in the answer",
        lambda output, item: float(compiled.search(output) is not None),
        needs_expected=False,
    )


def chrf() -> Scorer:
    """chrF2 (Popović 2015) by sacrebleu, divided by 100: F with beta 2 over character 1- to 6-grams, blanks ignored.

    chrF = (1 + 4) · P · R / (4 · P + R), P and R averaged over the n-gram orders.
    """
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    return Scorer(
        "chrf",
        "chrF2: F-score (beta 2) of character 1- to 6-grams, by sacrebleu",
        lambda output, item: metric.sentence_score(output, [expected_of(item)]).score / 100,
    )


def rouge_l() -> Scorer:
    """ROUGE-L (Lin 2004), F1: with L the longest common subsequence of words, P = L/|answer|, R = L/|expected|,
    F = 2PR/(P+R). Words are runs of letters and digits, lower-cased; no stemming.
    """
    return Scorer(
        "rouge_l",
        "ROUGE-L: F1 of the longest common subsequence of words",
        lambda output, item: rouge_l_f1(words(output), words(expected_of(item))),
    )


def label(labels: Sequence[str]) -> Scorer:
    """1 where the label read from the answer (see `read_label`) is the expected one; the mean is accuracy.

    Macro F1 over the labels stands beside it in the report: the plain mean over labels of 2TP / (2TP + FP + FN).
    """
    reader = LabelReader(labels)
    return Scorer(
        "label",
        "accuracy: 1 if the label read from the answer is the expected one",
        lambda output, item: float(reader.read(output) == expected_of(item).strip()),
    )


class LabelReader:
    """Reads a label out of an answer the way a forgiving program would, so that no contender loses by a full stop."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        plain = [_plain(each) for each in labels]
        # "us" and "US" as two labels: then case decides, and only exact answers count
        self._by_plain = dict(zip(plain, labels, strict=True)) if len(set(plain)) == len(plain) else {}
        longest_first = sorted(self._by_plain, key=len, reverse=True)
        within = "|".join(re.escape(each) for each in longest_first if each)
        self._within = re.compile(rf"(?<!\w)(?:{within})(?!\w)") if within else None

    def read(self, output: str) -> str | None:
        """The label the answer is; else its first line; else the only label that occurs in it; else None."""
        text = output.strip()
        if text in self._labels:
            return text
        first_line = text.split("\n", 1)[0]
        for candidate in (text, first_line):
            found = self._by_plain.get(_plain(candidate))
            if found is not None:
                return found
        if self._within is None:
            return None
        mentioned = set(self._within.findall(text.casefold()))
        return self._by_plain[mentioned.pop()] if len(mentioned) == 1 else None


def words(text: str) -> list[str]:
    """Runs of letters and digits, lower-cased."""
    return re.findall(r"\w+", text.lower())


def rouge_l_f1(answer: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence; two empty sequences agree."""
    if not answer or not expected:
        return float(len(answer) == len(expected))
    return 2 * longest_common_subsequence(answer, expected) / (len(answer) + len(expected))


def longest_common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Its length, by bit-parallel dynamic programming (Hyyrö 2004): one big-integer step for each element of `b`."""
    where: dict[Hashable, int] = {}
    for place, element in enumerate(a):
        where[element] = where.get(element, 0) | 1 << place
    everything = (1 << len(a)) - 1
    row = everything  # bit i is 0 where the length grows at a[i]
    for element in b:
        matched = row & where.get(element, 0)
        row = (row + matched | row - matched) & everything
    return len(a) - row.bit_count()


def _plain(text: str) -> str:
    """Case, quotes, emphasis and closing punctuation removed."""
    return text.strip().strip("\"'`*").rstrip(".,;:!").strip("\"'`* ").casefold()
