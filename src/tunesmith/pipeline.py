"""The path from a recipe to a verdict: check -> plan -> train -> prove. What a reader opens first.

Each public function is one command of the same name and returns the same facts as typed objects. `training` knows
nothing of the engine and `proof` nothing of the loop: they meet here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tunesmith.data.batches import Layout
from tunesmith.errors import InputError, RefusedError
from tunesmith.fitting import fit
from tunesmith.home import home
from tunesmith.preparation import Prepared, prepare, read_and_split, renderer_on_disk
from tunesmith.progress import Reporter
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, create_run, find_run, write_json


def train(
    recipe: Recipe, folder: Path | None = None, *, resume: bool = False, reporter: Reporter | None = None
) -> Run:
    """Gate, then train; leaves an adapter in the run's folder. Raises RefusedError where the gate blocks."""
    reporter = reporter or Reporter()
    place = folder or home() / "runs" / recipe.name
    refuse_taken(place, resume=resume)
    _use_threads(recipe)
    rows = read_and_split(recipe, reporter.say)
    ready = prepare(recipe, rows, reporter)
    run = create_run(place, resume=resume)
    fit(ready, run, resume=resume, layout=Layout(token_budget=4096), reporter=reporter)
    return run


def _use_threads(recipe: Recipe) -> None:
    if recipe.runtime.threads != "auto":
        torch.set_num_threads(recipe.runtime.threads)
