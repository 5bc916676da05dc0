"""lineage.json: what a run was made from, so that it can be verified, repeated, or refused to be resumed."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch

from tunesmith import __version__
from tunesmith.errors import InputError
from tunesmith.preparation import Prepared
from tunesmith.store.runs import Run, read_json
from tunesmith.types import Example

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
# What must be the same for a resumed run to end as the uninterrupted one would have.
MUST_MATCH = {
    "recipe_hash": "the recipe",
    "data_hash": "the data",
    "split_hash": "the split",
    "base_weights_hash": "the base's weights",
    "chat_template_hash": "the chat template",
    "lessons_hash": "what the teacher answers",
}


def lineage_of(ready: Prepared) -> dict[str, Any]:
    """The facts of a run about to start."""
    base, recipe = ready.base, ready.recipe
    return {
        "tunesmith": __version__,
        "recipe_hash": recipe.hash(),
        "data_hash": data_hash((*ready.split.train, *ready.split.held_out)),
        "split_hash": ready.split.hash,
        "lessons_hash": ready.lessons_hash,
        "rows": {"train": len(ready.split.train), "held_out": len(ready.split.held_out)},
        "base": base.name,
        "base_revision": base.revision,
        "base_weights_hash": base.weights_hash,
        "chat_template": ready.renderer.template,
        "chat_template_hash": ready.renderer.template_hash,
        "stop_ids": sorted(ready.renderer.stop_ids),
        "seed": recipe.train.seed,
        "device": str(base.device),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
    }


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over the rows' content hashes, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.id.encode())
    return digest.hexdigest()


def refuse_changed(run: Run, now: dict[str, Any]) -> None:
    """Raises InputError where what a run was started with is no longer so."""
    before = read_json(run.lineage)
    for key, what in MUST_MATCH.items():
        if before.get(key) != now[key]:
            raise InputError(f"{what} changed since this run was started; start a new run instead", file=run.folder)
