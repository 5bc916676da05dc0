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
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.train import parallel
from tunesmith.train.loop import Progress, TrainState
from tunesmith.train.sharding import read_parts, write_parts

MANIFEST = "manifest.json"
FORMAT = 1
RANDOM = "random"
PARTS = ("parameters", "optimizer", RANDOM)


def save_checkpoint(folder: Path, state: TrainState, *, keep: int = 2) -> Path:
    """Write `folder/step-N`, then remove all but the newest `keep` and the best. Returns the checkpoint's folder.

    Of several workers the first writes it; where the weights are spread over them, each writes its parts. All call.
    """
    final = folder / f"step-{state.progress.step}"
    partial = folder / f".{final.name}.partial"
    sharded = any(map(parallel.is_sharded, state.parameters.values()))
    if parallel.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (partial, final):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
    hashes = _write_parts(partial, state) if sharded else {}
    if not parallel.is_first():
        return final
    for part in (RANDOM,) if sharded else PARTS:
        hashes[part] = _write_tensors(partial / f"{part}.safetensors", getattr(state, part))
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


def load_newest(folder: Path, like: Mapping[str, Tensor] | None = None) -> TrainState | None:
    """The newest whole checkpoint, or None where there is none. `like`: see `load_checkpoint`."""
    states = (load_checkpoint(path, like) for path in list_checkpoints(folder))
    return next((state for state in states if state is not None), None)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose files are those that were written; the workers share the reading of them."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        names = sorted(manifest["sha256"])[parallel.rank() :: parallel.size()]
        whole = all(_hash(path / f"{name}.safetensors") == manifest["sha256"][name] for name in names)
        return manifest if whole and manifest["format"] == FORMAT else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _write_parts(folder: Path, state: TrainState) -> dict[str, str]:
    """Each worker its parts of parameters and optimiser, in one file; every file's hash by its name."""
    parallel.wait()  # for the folder
    path = write_parts(folder, {**state.parameters, **state.optimizer})
    return dict(parallel.gather([path.stem, _hash(path)]))


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
