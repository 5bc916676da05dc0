"""Proving a tune: the ladder on the held-out items, then the report from what it wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.items import items as items_of
from tunesmith.data.lazy import picked
from tunesmith.data.parts import answer_text
from tunesmith.data.prompts import read_prompt
from tunesmith.engine.completer import PromptRenderer
from tunesmith.errors import InputError
from tunesmith.progress import Reporter
from tunesmith.prove.answering import EngineModel, Model, Prompt, ReplyCache, Weights
from tunesmith.prove.contenders import TUNED, Bench, contender_names
from tunesmith.prove.endpoint import Endpoint
from tunesmith.prove.graders import Ask
from tunesmith.prove.ladder import Plan, run_ladder
from tunesmith.prove.measures import Prices
from tunesmith.prove.report import Report, report_from_items, write_report
from tunesmith.prove.retention import PROMPTS, measure_retention
from tunesmith.prove.rows import write_rows
from tunesmith.prove.scorers import LabelReader, Scorer
from tunesmith.prove.scoring import choose_scorers
from tunesmith.prove.slices import slice_items
from tunesmith.prove.task import Task, detect_task
from tunesmith.recipe import Compress, Recipe, is_endpoint
from tunesmith.store.runs import Run
from tunesmith.types import Example, Item

GRADING_TOKENS = 64  # of a judge's or grading model's answer
MEASURED_ANSWERS = 2000  # training answers whose length is looked at
BASE = "base"


@dataclass(frozen=True, slots=True)
class Voices:
    """Who can be asked.

    `tuned` maps contender names to weights: "tuned", and any earlier run or adapter the recipe names.
    """

    base: Weights
    tuned: Mapping[str, Weights] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Options:
    """What the recipe doesn't say."""

    schema: dict[str, Any] | None = None  # data.schema, read
    prices: Prices = field(default_factory=Prices)
    training_seconds: float | None = None
    grader_file: Path | None = None  # named on the command line
    stop_early: bool = True
    retention_prompts: int = PROMPTS


def prove_items(
    held_out: Sequence[Example],
    train: Sequence[Example],
    recipe: Recipe,
    voices: Voices,
    folder: Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Run the recipe's contenders on the held-out rows and report, leaving items.jsonl and report.json in `folder`.

    Replies are remembered in `replies.jsonl` there, by weights, prompt and length: killed and called again, it goes
    on where it was. Raises InputError for unknown contenders or scorers, and where there is nothing to prove on.
    """
    options, reporter = options or Options(), reporter or Reporter()
    items, train_items = (_blank_as_none(items_of(rows)) for rows in (held_out, train))
    if not items:
        raise InputError("there are no held-out rows to prove on; set data.held_out to a fraction or a file")
    task = detect_task([*train_items, *items], options.schema)
    cache = ReplyCache(Run(folder).replies)
    max_tokens = answer_budget(recipe, train if train_items else held_out, voices.base.engine.renderer)
    ask = asker(voices, cache)
    scorers = choose_scorers(recipe.prove.scorers, task, ask=ask, grader_file=options.grader_file)
    objective = recipe.objective
    prompt = read_prompt(objective) if isinstance(objective, Compress) else ()
    bench = Bench(voices.base, voices.tuned, train_items, task, recipe.prove, scorers[0], cache, max_tokens, prompt)
    reporter.stage("choosing wordings and examples on training rows")
    names = contender_names(recipe.prove, task, compressed=bool(prompt))
    contenders = [bench.build(name) for name in names if _possible(name, voices)]
    reporter.stage("asking every contender the held-out rows")
    plan = make_plan(items, train_items, scorers, task, recipe.data.group_by)
    reference = next((each.name for each in contenders if each.kind == "tuned"), None)
    rows = run_ladder(
        contenders, reference, plan, cache, out=folder / "items.jsonl", stop_early=options.stop_early, reporter=reporter
    )
    proof = {
        "scorer": scorers[0].name,
        "scorers": [{"name": scorer.name, "about": scorer.about} for scorer in scorers],
        "held_out": len(items),
        "task": task.kind,
        "max_new_tokens": max_tokens,
        "stop_early": options.stop_early,
        "choices": [choice.to_json() for choice in bench.choices],
        "retention": _retention(recipe, voices, options, reporter),
        "prices": asdict(options.prices),
        "training_seconds": options.training_seconds,
        "compress_margin": objective.margin / 100 if isinstance(objective, Compress) else None,
    }
    write_rows(folder / "items.jsonl", rows, proof)
    report = report_from_items(folder / "items.jsonl")
    write_report(report, folder / "report.json")
    return report


def _blank_as_none(items: Sequence[Item]) -> list[Item]:
    """An empty expected answer is none at all: nothing can be compared with it."""
    return [item if (item.expected or "").strip() else replace(item, expected=None) for item in items]


def make_plan(
    items: Sequence[Item], train: Sequence[Item], scorers: Sequence[Scorer], task: Task, group_by: str | None
) -> Plan:
    """The items with their groups (the group column, else copies of one row) and slices."""
    groups = {item.id: item.id.split("-")[0] for item in items}
    if group_by is not None:
        groups |= {item.id: str(item.columns[group_by]) for item in items if group_by in item.columns}
    reader = LabelReader(task.labels) if task.kind == "label" else None
    return Plan(items, scorers, reader, groups, slice_items(items, train, task))


def answer_budget(recipe: Recipe, train: Sequence[Example], renderer: PromptRenderer) -> int:
    """Tokens an answer may have: prove.max_new_tokens, or 1.25 times the training answers' 99th percentile and 8."""
    if recipe.prove.max_new_tokens != "auto":
        return recipe.prove.max_new_tokens
    some = np.flatnonzero(np.fromiter((bool(answer_text(row).strip()) for row in train), bool, len(train)))
    answers = map(answer_text, picked(train, some[:: max(1, len(some) // MEASURED_ANSWERS)]))
    lengths = sorted(len(renderer.completion_prompt_ids(answer)) for answer in answers)
    longest = lengths[math.ceil(0.99 * len(lengths)) - 1] if lengths else 256
    return round(longest * 1.25) + 8


def asker(voices: Voices, cache: ReplyCache) -> Ask:
    """How a judge or grading model is asked: "base", a tuned model by its contender name, or MODEL@URL."""
    models: dict[str, Model] = {}

    def ask(name: str, prompt: Prompt) -> str:
        if name not in models:
            models[name] = _grading_model(name, voices)
        reply = cache.answer(models[name], [prompt])[0]
        if reply.error is not None:
            raise ValueError(f"{name}: {reply.error}")
        return reply.output

    return ask


def _grading_model(name: str, voices: Voices) -> Model:
    if is_endpoint(name):
        return Endpoint(name, GRADING_TOKENS)
    weights = voices.base if name in (BASE, "prompt") else voices.tuned.get(name)
    if weights is None:
        known = ", ".join((BASE, *voices.tuned, "MODEL@URL"))
        raise InputError(f'the grading model "{name}" is not known here; known are {known}')
    return EngineModel(weights, GRADING_TOKENS)


def _possible(name: str, voices: Voices) -> bool:
    """Before there is a tuned model the other contenders can still be measured."""
    return TUNED in voices.tuned or name.split("+")[0] != TUNED


def _retention(recipe: Recipe, voices: Voices, options: Options, reporter: Reporter) -> dict[str, Any] | None:
    if not recipe.prove.retention or TUNED not in voices.tuned:
        return None
    reporter.stage("general behaviour: the base against the tuned model")
    measured = measure_retention(voices.base, voices.tuned[TUNED], prompts=options.retention_prompts, reporter=reporter)
    return measured.to_json()
