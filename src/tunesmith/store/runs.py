"""Run folders: the folder is the truth, the database only remembers where folders are.

A run made by `--run DIR` may lie anywhere; its path is noted in `$TUNESMITH_HOME/tunesmith.db`, which can be deleted
at any time: runs under `$TUNESMITH_HOME/runs` are found by looking, the others when they are next used.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from tunesmith.disk import write_text
from tunesmith.errors import InputError
from tunesmith.home import home
from tunesmith.recipe import Quantize


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder and the files in it."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def lineage(self) -> Path:
        return self.folder / "lineage.json"

    @property
    def data_report(self) -> Path:
        return self.folder / "data_report.json"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def columns(self) -> Path:
        """What an objective had computed of every row before its first step."""
        return self.folder / "columns.safetensors"

    @property
    def distributions(self) -> Path:
        """A teacher's likeliest tokens at every place of the answers."""
        return self.folder / "distributions.safetensors"

    @property
    def lessons(self) -> Path:
        """What a teacher answered: a line of facts, then one a row."""
        return self.folder / "lessons.jsonl"

    @property
    def replies(self) -> Path:
        """Every answer that was waited for, by what it depends on: nothing is asked twice."""
        return self.folder / "replies.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def model(self) -> Path:
        """The whole tuned model, for full fine-tuning."""
        return self.folder / "model"

    @property
    def parity(self) -> Path:
        """What the trainer made of a few rows, and whether the engine makes the same of them."""
        return self.folder / "parity.json"

    @property
    def items(self) -> Path:
        return self.folder / "items.jsonl"

    @property
    def report(self) -> Path:
        return self.folder / "report.json"

    @property
    def page(self) -> Path:
        return self.folder / "report.html"

    def exists(self) -> bool:
        return self.recipe.is_file()

    def tuned(self) -> Path:
        """The folder training left: `adapter/` or `model/`. Raises InputError where training hasn't finished."""
        for folder in (self.adapter, self.model):
            if folder.is_dir():
                return folder
        raise InputError("this run has no adapter yet; finish it with `tunesmith train ... --resume`", file=self.folder)


@dataclass(frozen=True, slots=True)
class Located:
    """What a name of a model stands for. `system` is the prompt it was trained with."""

    base: str
    adapter: Path | None = None
    system: str | None = None
    quantize: Quantize | None = None  # how the base under the adapter was quantised


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A line of `tunesmith runs list`."""

    name: str
    folder: str
    base: str
    state: str  # started | trained | proved
    steps: int
    decision: str | None  # the verdict
    changed: str  # ISO 8601, UTC


def refuse_taken(folder: Path, *, resume: bool) -> None:
    """Raises InputError where a run can't be made: before any work is done for it."""
    if Run(folder).exists() and not resume:
        raise InputError("this folder already holds a run; add --resume to continue it, or name another", file=folder)
    if folder.is_file():
        raise InputError("this is a file; --run names a folder", file=folder)
    nearest = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not os.access(nearest, os.W_OK):
        raise InputError("the run folder cannot be written; name one that can with --run", file=folder)


def create_run(folder: Path, *, resume: bool) -> Run:
    """Make a run folder. A folder that already holds a run is refused unless it is resumed."""
    run = Run(folder)
    refuse_taken(folder, resume=resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"the run folder cannot be written ({error.strerror})", file=folder) from None
    _remember(folder)
    return run


@contextmanager
def alone(run: Run) -> Iterator[None]:
    """Keep every other training out of the folder; a killed one lets go. Raises InputError where there is one."""
    descriptor = os.open(run.folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another process is training in this folder; stop it first", file=run.folder) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def find_run(name: str) -> Run:
    """A run by folder or by name. Raises InputError where there is none."""
    for candidate in (Path(name), home() / "runs" / name):
        if Run(candidate).exists():
            return Run(candidate)
    for folder in _known_folders():
        if folder.name == name:
            return Run(folder)
    raise InputError(f'there is no run "{name}"; `tunesmith runs list` shows those that exist')


def locate(model: str) -> Located:
    """A run by folder or name, an adapter's folder, or, where it is neither, a base. Raises InputError."""
    path = Path(model)
    if (path / "adapter_config.json").is_file():
        run = Run(path.resolve().parent)
        if run.exists():
            return _of_run(run)
        base = read_json(path / "adapter_config.json")["base_model_name_or_path"]
        return Located(base, path, quantize=_quantize_of(path))
    try:
        run = find_run(model)
    except InputError:
        return Located(model)
    return _of_run(run)


def _of_run(run: Run) -> Located:
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    tuned, system = run.tuned(), recipe["data"]["system"]
    if tuned == run.model:
        return Located(str(tuned), None, system)
    return Located(recipe["base"]["model"], tuned, system, recipe["base"].get("quantize"))


def _quantize_of(adapter: Path) -> Quantize | None:
    """What an adapter without a run says of its base; None too where its weights can't be read, as loading will say."""
    try:
        with safe_open(adapter / "adapter_model.safetensors", "numpy") as file:
            return (file.metadata() or {}).get("base_quantize")
    except (OSError, SafetensorError):
        return None


def list_runs() -> list[RunSummary]:
    """Every known run, the newest first."""
    summaries = [_summary(Run(folder)) for folder in _known_folders()]
    return sorted(summaries, key=lambda summary: summary.changed, reverse=True)


def remove_run(run: Run) -> None:
    """Delete a run folder and forget it."""
    shutil.rmtree(run.folder)
    if _database().exists():
        with sqlite3.connect(_database()) as connection:
            connection.execute("delete from runs where folder = ?", (str(run.folder.resolve()),))


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("this file is missing; the run is not that far yet", file=path) from None
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON ({error.msg})", file=path, line=error.lineno) from None


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _database() -> Path:
    return home() / "tunesmith.db"


def _remember(folder: Path) -> None:
    """Note a run folder that lies outside the home; one inside is found by looking."""
    if folder.resolve().parent == (home() / "runs").resolve():
        return
    home().mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(_database()) as connection:
        connection.execute("create table if not exists runs (folder text primary key)")
        connection.execute("insert or ignore into runs values (?)", (str(folder.resolve()),))


def _known_folders() -> Iterator[Path]:
    runs = home() / "runs"
    if runs.is_dir():
        yield from (folder for folder in sorted(runs.iterdir()) if Run(folder).exists())
    if _database().exists():
        with sqlite3.connect(_database()) as connection:
            connection.execute("create table if not exists runs (folder text primary key)")
            rows = connection.execute("select folder from runs order by folder").fetchall()
        yield from (Path(folder) for (folder,) in rows if Run(Path(folder)).exists())


def _summary(run: Run) -> RunSummary:
    recipe = yaml.load(run.recipe.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    report = read_json(run.report) if run.report.exists() else None
    trained = run.adapter.is_dir() or run.model.is_dir()
    newest = max(path.stat().st_mtime for path in (run.recipe, run.metrics, run.report) if path.exists())
    return RunSummary(
        name=run.name,
        folder=str(run.folder),
        base=recipe["base"]["model"],
        state="proved" if report else "trained" if trained else "started",
        steps=sum(1 for row in read_metrics(run) if "loss" in row),
        decision=report["verdict"]["decision"] if report else None,
        changed=datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
    )


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut off by a kill is left out."""
    if not run.metrics.exists():
        return []
    rows = []
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
