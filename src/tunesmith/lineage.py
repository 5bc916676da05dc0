"""lineage.json: what a run was made from, so that it can be verified, repeated, or refused to be resumed.

    MUST_MATCH   another run, if one of these differs: a resume is refused
    SAME_BYTES   the same run, and the same bytes only if all of these are the same too

A resumed run keeps to the threads and the layout it was started with, whatever is free now. Where it can't, or where
another version or processor computes, it goes on, says so, and the lineage notes from which step.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tunesmith import __version__
from tunesmith.data.batches import Layout
from tunesmith.errors import InputError
from tunesmith.preparation import Prepared
from tunesmith.recipe import Recipe
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
# What must be the same besides, for the same bytes: sums are rounded in the order in which they are computed.
SAME_BYTES = ("tunesmith", "packages", "processor", "device", "dtype", "threads", "layout")


@dataclass(frozen=True, slots=True)
class Started:
    """How a run that is resumed has been computed so far. `memory_limit` in bytes."""

    threads: int
    layout: Layout
    memory_limit: int


def started(run: Run, recipe: Recipe) -> Started | None:
    """How the run was started; None where it had not got that far. Raises InputError where the recipe is another."""
    if not run.lineage.exists():
        return None
    before = read_json(run.lineage)
    _refuse(run, before, {"recipe_hash": recipe.hash()})
    try:
        return Started(before["threads"], Layout(**before["layout"]), before["memory_limit"])
    except (KeyError, TypeError):  # written by an earlier version
        return None


def lineage_of(ready: Prepared, layout: Layout, memory_limit: int) -> dict[str, Any]:
    """The facts of a run about to start."""
    base, recipe = ready.base, ready.recipe
    return {
        "tunesmith": __version__,
        "recipe_hash": recipe.hash(),
        "data_hash": data_hash(chain(ready.split.train, ready.split.held_out)),
        "split_hash": ready.split.hash,
        "lessons_hash": ready.lessons_hash,
        "rows": {"train": len(ready.split.train), "held_out": len(ready.split.held_out)},
        "base": base.name,
        "base_revision": base.revision,
        "base_weights_hash": base.weights_hash,
        "quantize": base.quantize,
        "chat_template": ready.renderer.template,
        "chat_template_hash": ready.renderer.template_hash,
        "stop_ids": sorted(ready.renderer.stop_ids),
        "seed": recipe.train.seed,
        "device": str(base.device),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "layout": asdict(layout),
        "memory_limit": memory_limit,
        "processor": _processor(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "must_match": {"to_resume": [*MUST_MATCH], "for_the_same_bytes": [*MUST_MATCH, *SAME_BYTES]},
    }


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over the rows' content hashes, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.id.encode())
    return digest.hexdigest()


def resumed(run: Run, now: dict[str, Any], step: int) -> tuple[dict[str, Any], str | None]:
    """The lineage of a run that goes on after `step`, and, where its bytes may now differ, a sentence that says why.

    Raises InputError where it would be another run.
    """
    before = read_json(run.lineage)
    _refuse(run, before, {key: now[key] for key in MUST_MATCH})
    changed = {key: [before.get(key), now[key]] for key in SAME_BYTES if before.get(key) != now[key]}
    if not changed:
        return before, None
    what = ", ".join(f"{key} ({_short(*pair)})" for key, pair in changed.items())
    note = {"after_step": step, "changed": changed}
    return {**before, "resumed": [*before.get("resumed", ()), note]}, (
        f"not as this run was started: {what}; what comes is that of an uninterrupted run to rounding, not to the byte"
    )


def _refuse(run: Run, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            what = MUST_MATCH[key]
            raise InputError(f"{what} changed since this run was started; start a new run instead", file=run.folder)


def _short(before: Any, now: Any) -> str:
    """`2 -> 1`; of mappings only what differs."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{before} -> {now}"
    return ", ".join(f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value)


def _processor() -> str:
    """`Intel(R) Xeon(R) ... (AVX512)`: libraries choose their code by it, and every choice rounds in its own way."""
    name, facts = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if facts.exists():
        models = [line for line in facts.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
