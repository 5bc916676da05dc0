"""Real processes: `tunesmith ...` each in its own, forked from one that has the packages imported already."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while others work make no progress
HANGS = "the step hangs"  # what a process says that is in its endless step
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tunesmith.cli", "tunesmith.pipeline", "tunesmith.fitting", "sklearn.linear_model"])


@dataclass
class Command:
    """A running command; what it prints goes to files, as a shell would send it there."""

    process: BaseProcess
    said: Path

    def wait(self) -> int:
        """The exit status; minus the signal's number where one ended it."""
        self.process.join(120)
        assert self.process.exitcode is not None, "still running after two minutes"
        return self.process.exitcode

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        if self.process.pid is not None and self.running:
            os.kill(self.process.pid, number)

    @property
    def stderr(self) -> str:
        return self.said.read_text() if self.said.exists() else ""


def start(*words: str | Path, home: Path, largest_file: int | None = None, endless_step: int | None = None) -> Command:
    """Start a command with a home of its own; `largest_file` bytes is all that any file of it may hold.

    endless_step  a training step, from 1, that never ends by itself
    """
    home.mkdir(parents=True, exist_ok=True)
    said = home / "stderr"
    said.unlink(missing_ok=True)
    ways = (largest_file, endless_step)
    process = CONTEXT.Process(target=_run, args=([str(word) for word in words], home, said, *ways), daemon=True)
    process.start()
    return Command(process, said)


def run(*words: str | Path, home: Path, largest_file: int | None = None) -> tuple[int, str]:
    """(exit status, stderr) of a command that is left alone."""
    command = start(*words, home=home, largest_file=largest_file)
    status = command.wait()
    return status, command.stderr


def _run(words: list[str], home: Path, said: Path, largest_file: int | None, endless_step: int | None) -> None:
    scratch = home / "scratch"
    scratch.mkdir(exist_ok=True)
    os.environ.update(
        TUNESMITH_HOME=str(home / "tunesmith"), HOME=str(home), TMPDIR=str(scratch), TUNESMITH_OFFLINE="1"
    )
    os.environ.pop("HF_HOME", None)
    tempfile.tempdir = None
    errors = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number, where in ((0, nothing), (1, nothing), (2, errors)):
        os.dup2(where, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if endless_step is not None:
        _never_end(endless_step)
    os.chdir(home)
    sys.argv = ["tunesmith", *words]
    main: Callable[[], None] = __import__("tunesmith.cli", fromlist=["main"]).main
    main()


def _never_end(step: int) -> None:
    """The training of this process hangs in the middle of that step."""
    from tunesmith.train import loop

    accumulate = loop.accumulate

    def slow(body: Any, part: Any, *rest: Any, **named: Any) -> Any:
        found = accumulate(body, part, *rest, **named)
        if part.index == step - 1:
            print(HANGS, file=sys.stderr, flush=True)
        while part.index == step - 1:
            time.sleep(0.01)
        return found

    loop.accumulate = slow
