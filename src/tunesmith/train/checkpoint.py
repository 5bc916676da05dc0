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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.disk import flush, os_errors, write_text
from tunesmith.train.loop import Progress, TrainState

MANIFEST = "manifest.json"
FORMAT = 2
PARTS = ("parameters", "optimizer", "random")


def save_checkpoint(folder: Path, state: TrainState, *, keep: int = 2) -> Path:
    """Write `folder/step-N`, then remove all but the newest `keep` and the best. Returns the checkpoint's folder.

    A whole one of that step is left as it is. Raises OSError where it can't be written; the others are untouched then.
    """
    folder.mkdir(exist_ok=True)  # never its parents: a run's folder that is gone was taken away
    final = folder / f"step-{state.progress.step}"
    if load_checkpoint(final) is None:
        partial = folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write_whole(partial, state)
        except OSError:  # a full disk needs its room back
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        flush(folder)
    _remove_others(folder, keep, state.progress)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders that bear a checkpoint's name, newest first; whole or not."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def load_checkpoint(path: Path) -> TrainState | None:
    """Read one checkpoint; None where it is damaged or not whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT or manifest["sha256"]["progress"] != _hash_of(manifest["progress"]):
            return None
        files = {part: path / f"{part}.safetensors" for part in PARTS}
        if any(_hash(file) != manifest["sha256"][part] for part, file in files.items()):
            return None
        tensors = {part: load_file(file) for part, file in files.items()}
        return TrainState(Progress(**manifest["progress"]), **tensors)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError):
        return None


def load_newest(folder: Path, say: Callable[[str], None] = lambda _: None) -> TrainState | None:
    """The newest whole checkpoint, or None where there is none. `say` is told of each that is passed over."""
    for path in list_checkpoints(folder):
        state = load_checkpoint(path)
        if state is not None:
            return state
        say(f"{path} is damaged (its files are not those its manifest was written for); going on from one before it")
    return None


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


def _write_whole(folder: Path, state: TrainState) -> None:
    folder.mkdir()
    hashes = {part: _write_tensors(folder / f"{part}.safetensors", getattr(state, part)) for part in PARTS}
    progress = asdict(state.progress)
    manifest = {"format": FORMAT, "progress": progress, "sha256": {**hashes, "progress": _hash_of(progress)}}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True))


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
