"""Folders that hold a model: what they must contain, whether they are whole, and the hash of their weights."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from tunesmith.errors import InputError
from tunesmith.home import home
from tunesmith.models.fetch import sha256_of, writing

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")
MANIFEST = "tunesmith.json"
FORMAT = 1  # raise it when a conversion's content changes; older ones are then made anew


def is_whole(folder: Path) -> bool:
    """Whether a conversion was finished and its files are still what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return False
        return all(
            (folder / name).stat().st_size == facts["bytes"] and file_hash(folder / name) == facts["sha256"]
            for name, facts in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no manifest, a broken one, or a file of it is gone


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time makes `folder`; leftovers of one that was killed are removed first."""
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    try:
        for leftover in folder.parent.glob(f".partial-{glob.escape(folder.name)}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()


def check_folder(folder: Path) -> None:
    """Raise InputError where a folder cannot be a base: no configuration, no safetensors, no tokenizer."""
    if not (folder / "config.json").is_file():
        raise InputError(
            "this folder holds no config.json, so it is not a model; name the folder that has it", file=folder
        )
    weight_files(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError("this folder holds no tokenizer.json; copy the model's tokenizer files into it", file=folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files the model is loaded from, in order. Raises InputError, naming any pickled ones instead."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, UnicodeDecodeError):
            raise InputError("the index of the weights is not valid JSON; copy it again", file=index) from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise InputError(f"the weights file {missing[0]} is missing; copy it into the folder", file=folder)
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLED):
        raise InputError(
            f"its weights are pickled ({pickled[0]}), which can run code when loaded; convert them to safetensors",
            file=folder,
        )
    raise InputError("this folder holds no model.safetensors; copy the model's weights into it", file=folder)


def weights_hash(folder: Path) -> str:
    """SHA-256 over the `sha256sum` lines of the weights files: `<hash>  <name>\\n`, in order of name."""
    lines = [f"{file_hash(path)}  {path.name}\n" for path in weight_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """A file's SHA-256, remembered in $TUNESMITH_HOME until its size, times or inode change."""
    try:
        entry = json.loads(_memory_of(path).read_text(encoding="utf-8"))
        if entry["state"] == _state(path):
            return entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not remembered, or not readable: hash it
    digest = sha256_of(path)
    remember_hash(path, digest)
    return digest


def remember_hash(path: Path, digest: str) -> None:
    """Note a file's SHA-256; a home that cannot be written only costs the time to hash it again."""
    memory = _memory_of(path)
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        partial.write_text(json.dumps({"state": _state(path), "sha256": digest}), encoding="utf-8")
        os.replace(partial, memory)


def _state(path: Path) -> list[Any]:
    """What changes when a file does. A program cannot set the change time, so an old date set back is noticed."""
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _memory_of(path: Path) -> Path:
    return home() / "models" / ".hashes" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
