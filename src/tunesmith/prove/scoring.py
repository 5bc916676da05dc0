"""Which scorers a task gets, and scoring answers with them so that no fault goes uncounted."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.chat.parse import spoken
from tunesmith.errors import InputError
from tunesmith.prove.graders import GRADERS, Ask, grader_scorer
from tunesmith.prove.json_scorers import json_exact, json_fields, json_schema, json_valid
from tunesmith.prove.judge import CRITERIA, judge
from tunesmith.prove.scorers import Scorer, chrf, contains, exact_match, label, regex, rouge_l
from tunesmith.prove.task import Task
from tunesmith.types import Item

SHORT_ANSWER_WORDS = 5
Chosen = Sequence[str | Mapping[str, Any]] | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer's scores. A value of None: the row has no expected answer to compare with. `faults`: scorers that
    raised, or gave no number from 0 to 1, and why; they count as 0.
    """

    scores: dict[str, float | None]
    faults: dict[str, str]


def choose_scorers(
    chosen: Chosen, task: Task, *, ask: Ask | None = None, grader_file: Path | None = None
) -> list[Scorer]:
    """The scorers of a run, the main one first. Raises InputError for an unknown name or a grader that can't be run.

    auto: JSON answers are scored by fields, labels by accuracy, short texts by exact match, longer ones by chrF.
    """
    given = _auto(task) if chosen == "auto" else chosen
    scorers = [python_grader(grader_file)] if grader_file is not None else []
    for each in given:
        scorers += _named(each, task, ask) if isinstance(each, str) else _described(each, task, ask)
    names = [scorer.name for scorer in scorers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f'prove.scorers: two scorers are called "{twice}"; give each its own name')
    return scorers


def needs_model(chosen: Chosen) -> bool:
    """Whether the main scorer asks a model."""
    first = None if isinstance(chosen, str) else chosen[0]
    return isinstance(first, Mapping) and _kind(first) in ("judge", "score_model", "label_model", "multi")


def score_answer(scorers: Sequence[Scorer], output: str, item: Item, *, failed: str | None = None) -> Scored:
    """Score one answer, what was thought before it aside. `failed`: why there is none; then every scorer gives 0."""
    output = spoken(output)
    scores: dict[str, float | None] = {}
    faults: dict[str, str] = {}
    for scorer in scorers:
        if scorer.needs_expected and item.expected is None:
            scores[scorer.name] = None
        elif failed is not None:
            scores[scorer.name] = 0.0
        else:
            scores[scorer.name] = _safely(scorer, output, item, faults)
    return Scored(scores, faults)


def python_grader(path: Path) -> Scorer:
    """A scorer from a file the user named: `def grade(sample, item) -> float`, OpenAI's signature.

    `sample` is {"output_text"}, `item` the row's columns with "input" and "expected".
    """
    from tunesmith.prove.task import question

    if not path.is_file():
        raise InputError("there is no such grader; name a Python file that defines grade(sample, item)", file=path)
    spec = importlib.util.spec_from_file_location(f"tunesmith_grader_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises while it is read
        raise InputError(f"the grader cannot be loaded ({type(error).__name__}: {error})", file=path) from None
    grade = getattr(module, "grade", None)
    if not callable(grade):
        raise InputError("the grader defines no function grade(sample, item)", file=path)

    def score(output: str, item: Item) -> float:
        row = {"input": question(item), "expected": item.expected, **item.columns}
        return float(grade({"output_text": output}, row))  # type: ignore[arg-type]

    return Scorer(path.stem, f"grade() of {path.name}", score, needs_expected=False)


def _safely(scorer: Scorer, output: str, item: Item, faults: dict[str, str]) -> float:
    try:
        value = float(scorer.grade(output, item))
    except InputError:  # a grading model that isn't known, or may not be reached: no row's fault
        raise
    except Exception as error:  # a user's grader may raise anything; one row's fault must not end the proof
        faults[scorer.name] = f"{type(error).__name__}: {error}"[:300]
        return 0.0
    if not (math.isfinite(value) and 0 <= value <= 1):
        faults[scorer.name] = f"the score {value} is not from 0 to 1"
        return 0.0
    return value


def _auto(task: Task) -> list[str]:
    if task.kind == "json":
        return ["json_fields", "json_exact", "json_valid", *(["json_schema"] if task.schema else []), "exact_match"]
    if task.kind == "label":
        return ["label", "exact_match"]
    if task.words <= SHORT_ANSWER_WORDS:
        return ["exact_match", "chrf"]
    return ["chrf", "rouge_l", "exact_match"]


def _named(name: str, task: Task, ask: Ask | None) -> list[Scorer]:
    if name == "json_schema":
        if task.schema is None:
            raise InputError("prove.scorers: json_schema needs data.schema to name a JSON Schema file")
        return [json_schema(task.schema)]
    if name == "label":
        if not task.labels:
            raise InputError("prove.scorers: label needs a few repeated answers; these rows' answers are no label set")
        return [label(task.labels)]
    if name == "regex":
        raise InputError("prove.scorers: write regex with its pattern, as {regex: PATTERN}")
    if name == "judge":
        raise InputError("prove.scorers: write judge with its model, as {judge: CONTENDER or MODEL@URL}")
    if name not in PLAIN:
        near = difflib.get_close_matches(name, [*PLAIN, "label", "json_schema", "regex", "judge"], n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(PLAIN)}"
        raise InputError(f'prove.scorers: unknown scorer "{name}"; {hint}')
    return [PLAIN[name]()]


def _described(given: Mapping[str, Any], task: Task, ask: Ask | None) -> list[Scorer]:
    """A scorer with settings: {regex: PATTERN}, {judge: MODEL}, {type: regex, pattern}, or an OpenAI grader."""
    kind = _kind(given)
    if kind == "regex":
        return [regex(str(given.get("pattern", given.get("regex"))), str(given.get("name", "regex")))]
    if kind == "judge":
        model = given.get("model", given.get("judge"))
        if ask is None or not model:
            raise InputError("prove.scorers: judge needs a model to ask, as {judge: CONTENDER or MODEL@URL}")
        return judge(str(model), ask, str(given.get("criteria", CRITERIA)))
    if kind in GRADERS or kind == "python":
        return [grader_scorer(given, ask)]
    raise InputError(
        f'prove.scorers: "{kind}" is no scorer with settings; known are regex, judge, {", ".join(GRADERS)}'
    )


def _kind(given: Mapping[str, Any]) -> Any:
    return given.get("type") or (next(iter(given)) if len(given) == 1 else None)


PLAIN: dict[str, Callable[[], Scorer]] = {
    "exact_match": exact_match,
    "contains": contains,
    "chrf": chrf,
    "rouge_l": rouge_l,
    "json_valid": json_valid,
    "json_exact": json_exact,
    "json_fields": json_fields,
}
