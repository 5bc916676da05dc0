"""The path from a recipe to a verdict: check -> plan -> train -> prove. What a reader opens first.

Each public function is one command of the same name and returns the same facts as typed objects. `training` knows
nothing of the engine and `proof` nothing of the loop: they meet here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.batches import Layout
from tunesmith.data.checks import DataReport, gate
from tunesmith.data.fix import write_fixed
from tunesmith.data.look import show_rows
from tunesmith.engine.engine import Engine
from tunesmith.errors import InputError, RefusedError
from tunesmith.fitting import TUNED, fit
from tunesmith.home import home
from tunesmith.models.folders import file_hash
from tunesmith.preparation import Prepared, prepare, read_and_split, renderer_on_disk
from tunesmith.progress import Reporter
from tunesmith.prove.card import write_card
from tunesmith.prove.page import write_page
from tunesmith.prove.proving import Options, Voices, Weights, prove_items
from tunesmith.prove.report import Report, report_from_items
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, create_run, find_run, read_json, read_metrics, refuse_taken, write_json


def check(recipe: Recipe, *, fix: Path | None = None, show: int = 0, reporter: Reporter | None = None) -> DataReport:
    """The data gate. `fix` writes a cleaned copy there; `show` shows that many rows as the model sees them."""
    reporter = reporter or Reporter()
    renderer = renderer_on_disk(recipe)
    if renderer is None:
        reporter.say(f"{recipe.base.model} is not on this machine: rules that need its tokenizer are left out")
    report = gate(recipe.data, renderer)
    if fix is not None:
        reporter.say(write_fixed(report, fix))
    if show and renderer is not None:
        reporter.show(show_rows(report.split.train, renderer, show))
    return report


def train(recipe: Recipe, folder: Path | None = None, *, resume: bool = False, reporter: Reporter | None = None) -> Run:
    """Gate, then train; leaves an adapter in the run's folder. Raises RefusedError where the gate blocks."""
    reporter = reporter or Reporter()
    place = folder or home() / "runs" / recipe.name
    refuse_taken(place, resume=resume)
    if recipe.runtime.threads != "auto":
        torch.set_num_threads(recipe.runtime.threads)
    rows = read_and_split(recipe, reporter.say)
    ready = prepare(recipe, rows, reporter)
    run = create_run(place, resume=resume)
    fit(ready, run, resume=resume, layout=Layout(token_budget=4096), reporter=reporter)
    return run


def prove(name: str | Path, *, from_items: bool = False, reporter: Reporter | None = None) -> Report:
    """The ladder of contenders on the run's held-out rows. `from_items` computes all numbers from items.jsonl again."""
    reporter = reporter or Reporter()
    run = find_run(str(name))
    if from_items:
        report = report_from_items(run.items)
    else:
        report = _prove(run, Recipe.load(run.recipe), reporter)
    write_page(run, report)
    write_card(run, report)
    reporter.say(f"report:  {run.page}\nadapter: {run.tuned()}")
    return report


def run(
    recipe: Recipe, folder: Path | None = None, *, resume: bool = False, reporter: Reporter | None = None
) -> Report:
    """The main job: check, plan, train, prove, card."""
    done = train(recipe, folder, resume=resume, reporter=reporter)
    return prove(done.folder, reporter=reporter)


def export(name: str | Path, out: Path, *, to: str) -> Path:
    """Write a run's result for others: `peft` its adapter, `merged` the base with the adapter merged in."""
    raise InputError(f"{to}")


def _prove(run: Run, recipe: Recipe, reporter: Reporter) -> Report:
    tuned = run.tuned()
    rows = read_and_split(recipe, lambda _: None)
    lineage = read_json(run.lineage)
    if rows.hash != lineage["split_hash"]:
        raise InputError(
            "the data changed since this run was trained, so its held-out rows are not known", file=run.folder
        )
    reporter.stage(f"engine {recipe.base.model}")
    whole = tuned == run.model
    engine = Engine(recipe.base.model, adapters={} if whole else {TUNED: str(tuned)})
    base = Weights(engine, None, lineage["base_weights_hash"])
    voices = Voices(
        base,
        engine.renderer,
        engine.context_length,
        {TUNED: Weights(Engine(str(tuned)) if whole else engine, None if whole else TUNED, _hash(tuned))},
    )
    seconds = sum(row.get("seconds", 0.0) for row in read_metrics(run))
    schema = recipe.data.schema_file
    options = Options(
        schema=json.loads(Path(schema).read_text(encoding="utf-8")) if schema else None, training_seconds=seconds
    )
    return prove_items(rows.held_out, rows.train, recipe, voices, run.folder, options, reporter)


def _hash(tuned: Path) -> str:
    return file_hash(next(iter(sorted(tuned.glob("*.safetensors")))))
