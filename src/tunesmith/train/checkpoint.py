"""Checkpoints: a folder with safetensors files and a JSON manifest that holds their hashes. No pickle.

A folder is written beside its place, flushed to the disk and renamed, so that what bears the name `step-N` is whole;
reading checks the hashes all the same and goes on to the next older one where they do not match.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.train.loop import Progress, TrainState

MANIFEST = "manifest.json"
FORMAT = 1
PARTS = ("parameters", "optimizer", "random")


def save_checkpoint(folder: Path, state: TrainState, *, keep: int = 2) -> Path:
    """Write `folder/step-N`, then remove all but the newest `keep` and the best. Returns the checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.progress.step}"
    partial = folder / f".{final.name}.partial"
    for leftover in (partial, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    hashes = {part: _write_tensors(partial / f"{part}.safetensors", getattr(state, part)) for part in PARTS}
    manifest = {"format": FORMAT, "progress": asdict(state.progress), "sha256": hashes}
    _write(partial / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())
    _flush_folder(partial)
    partial.rename(final)
    _flush_folder(folder)
    _remove_old(folder, keep, state.progress.best_step)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders that bear a checkpoint's name, newest first; whole or not."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def load_checkpoint(path: Path) -> TrainState | None:
    """Read one checkpoint; None where it is damaged or not whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return None
        files = {part: path / f"{part}.safetensors" for part in PARTS}
        if any(_hash(file) != manifest["sha256"][part] for part, file in files.items()):
            return None
        tensors = {part: load_file(file) for part, file in files.items()}
        return TrainState(Progress(**manifest["progress"]), **tensors)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError):
        return None


def load_newest(folder: Path) -> TrainState | None:
    """The newest whole checkpoint, or None where there is none."""
    states = (load_checkpoint(path) for path in list_checkpoints(folder))
    return next((state for state in states if state is not None), None)


def _remove_old(folder: Path, keep: int, best_step: int | None) -> None:
    for path in list_checkpoints(folder)[keep:]:
        if path.name != f"step-{best_step}":
            shutil.rmtree(path)
    for leftover in folder.glob(".step-*.partial"):
        shutil.rmtree(leftover)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
