"""A training that ends early: what is kept, and how to go on, in a sentence."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.disk import REFUSALS
from tunesmith.errors import InterruptedRun, TunesmithError
from tunesmith.store.runs import Run
from tunesmith.train.checkpoint import list_checkpoints


def resume_command(run: Run) -> str:
    return f"tunesmith train {shlex.quote(str(run.recipe))} --run {shlex.quote(str(run.folder))} --resume"


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
