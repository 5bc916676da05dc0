"""Checkpoints: a folder with safetensors files and a JSON manifest that holds their hashes. No pickle.

A folder is written beside its place, flushed to the disk and renamed, so that what bears the name `step-N` is whole;
reading checks the hashes all the same and goes on to the next older one where they do not match. The learning rate and
the position in the data are functions of the step, so they need no place of their own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.disk import flush, os_errors, write_text
from tunesmith.train import parallel
from tunesmith.train.loop import Progress, TrainState
from tunesmith.train.sharding import read_parts, write_parts

MANIFEST = "manifest.json"
FORMAT = 2
RANDOM, PROGRESS = "random", "progress"
PARTS = ("parameters", "optimizer", RANDOM)


def save_checkpoint(folder: Path, state: TrainState, *, keep: int = 2) -> Path:
    """Write `folder/step-N`, then remove all but the newest `keep` and the best. Returns the checkpoint's folder.

    A whole one of that step is left as it is. Of several workers the first writes it; where the weights are spread over
    them, each writes its parts. All call. Raises OSError where it can't be written; the others are untouched then.
    """
    final = folder / f"step-{state.progress.step}"
    if load_checkpoint(final, state.parameters) is None:
        partial = folder / f".{final.name}.partial"
        try:
            _write(partial, final, state)
        except OSError:  # a full disk needs its room back
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if parallel.is_first():
        _remove_others(folder, keep, state.progress)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders that bear a checkpoint's name, newest first; whole or not."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def load_checkpoint(path: Path, like: Mapping[str, Tensor] | None = None) -> TrainState | None:
    """Read one checkpoint; None where it is damaged or not whole.

    like  the parameters it is for: needed where the workers hold parts of them, or those that wrote it did. All call.
    """
    manifest = _read_manifest(path)
    if not all(parallel.gather(manifest is not None)) or manifest is None:
        return None
    try:
        progress, random = Progress(**manifest["progress"]), load_file(path / f"{RANDOM}.safetensors")
        if like is not None and (any(map(parallel.is_sharded, like.values())) or PARTS[0] not in manifest["sha256"]):
            return TrainState(progress, *read_parts(path, like), random)
        tensors = {part: load_file(path / f"{part}.safetensors") for part in PARTS if part != RANDOM}
        return TrainState(progress, **tensors, random=random)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError):
        return None


def load_newest(
    folder: Path, like: Mapping[str, Tensor] | None = None, say: Callable[[str], None] = lambda _: None
) -> TrainState | None:
    """The newest whole checkpoint, or None where there is none. `like`: see `load_checkpoint`.

    `say` is told of each that is passed over.
    """
    for path in list_checkpoints(folder):
        state = load_checkpoint(path, like)
        if state is not None:
            return state
        say(f"{path} is damaged (its files are not those its manifest was written for); going on from one before it")
    return None


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose files are those that were written; the workers share the reading of them."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        hashes = manifest["sha256"]
        if manifest["format"] != FORMAT or hashes[PROGRESS] != _hash_of(manifest[PROGRESS]):
            return None
        names = sorted(hashes.keys() - {PROGRESS})[parallel.rank() :: parallel.size()]
        return manifest if all(_hash(path / f"{name}.safetensors") == hashes[name] for name in names) else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _write(partial: Path, final: Path, state: TrainState) -> None:
    """Beside, flushed, renamed."""
    sharded = any(map(parallel.is_sharded, state.parameters.values()))
    if parallel.is_first():
        final.parent.mkdir(exist_ok=True)  # never its parents: a run's folder that is gone was taken away
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    hashes = _write_parts(partial, state) if sharded else {}
    if not parallel.is_first():
        return
    for part in (RANDOM,) if sharded else PARTS:
        hashes[part] = _write_tensors(partial / f"{part}.safetensors", getattr(state, part))
    progress = asdict(state.progress)
    manifest = {"format": FORMAT, PROGRESS: progress, "sha256": {**hashes, PROGRESS: _hash_of(progress)}}
    write_text(partial / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    flush(final.parent)


def _write_parts(folder: Path, state: TrainState) -> dict[str, str]:
    """Each worker its parts of parameters and optimiser, in one file; every file's hash by its name."""
    parallel.wait()  # for the folder
    path = write_parts(folder, {**state.parameters, **state.optimizer})
    return dict(parallel.gather([path.stem, _hash(path)]))


def _remove_others(folder: Path, keep: int, now: Progress) -> None:
    """All but the newest few and the best; also what lies ahead, which was damaged and passed over."""
    here = folder / f"step-{now.step}"
    found = list_checkpoints(folder)
    behind = found[found.index(here) :]
    kept = {*behind[:keep], folder / f"step-{now.best_step}"}
    for path in found:
        if path not in kept:
            shutil.rmtree(path)
    for leftover in folder.glob(".step-*.partial"):
        shutil.rmtree(leftover)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    with os_errors(path):
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    flush(path)
    return _hash(path)


def _hash_of(progress: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
