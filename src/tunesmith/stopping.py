"""A run that ends early: what is kept, and how to go on, in a sentence."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from tunesmith.disk import REFUSALS
from tunesmith.errors import InterruptedRun, TunesmithError
from tunesmith.store.runs import Run
from tunesmith.train.checkpoint import list_checkpoints

COMMAND = "TUNESMITH_COMMAND"  # in a worker's environment: what the person asked for, of which it does a part
_asked: ContextVar[str | None] = ContextVar("asked", default=None)


@contextmanager
def part_of(command: str) -> Iterator[None]:
    """What is trained in here is a part of this command, so that is what goes on with all of it."""
    token = _asked.set(command)
    try:
        yield
    finally:
        _asked.reset(token)


def asked() -> str:
    """The command that training is a part of: train or run."""
    return _asked.get() or os.environ.get(COMMAND, "train")


def resume_command(run: Run) -> str:
    return f"tunesmith {asked()} {shlex.quote(str(run.recipe))} --run {shlex.quote(str(run.folder))} --resume"


@contextmanager
def stopping_proof(run: Run, overrides: Sequence[str]) -> Iterator[None]:
    """Turn a signal during the proof into a sentence. Training is done, and answers given so far are remembered.

    `overrides` of the recipe are part of the command that goes on.
    """
    try:
        yield
    except KeyboardInterrupt:
        settings = [word for override in overrides for word in ("--set", override)]
        command = shlex.join(["tunesmith", "prove", str(run.folder), *settings])
        raise InterruptedRun(f"stopped while proving; continue with:\n  {command}") from None


@contextmanager
def stopping(run: Run) -> Iterator[None]:
    """Turn what ends a training from outside into a sentence: a disk that refuses, and a signal that would not wait."""
    try:
        yield
    except KeyboardInterrupt:
        if not run.exists():
            raise
        raise InterruptedRun(f"stopped at once; {_kept(run)}; continue with:\n  {resume_command(run)}") from None
    except OSError as error:
        if not run.folder.is_dir():
            raise TunesmithError(f"{run.folder}: the run folder is gone, so training stopped") from None
        if error.errno not in REFUSALS:
            raise
        place, reason = error.filename or run.folder, (error.strerror or "cannot be written").lower()
        raise TunesmithError(
            f"{place}: {reason}, so training stopped; {_kept(run)}; make room, then continue with:\n"
            f"  {resume_command(run)}"
        ) from None


def _kept(run: Run) -> str:
    newest = next(iter(list_checkpoints(run.checkpoints)), None)
    return "nothing was saved yet" if newest is None else f"the checkpoint {newest.name} is kept"
