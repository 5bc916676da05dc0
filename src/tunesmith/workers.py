"""`runtime.workers: N`: one command becomes N processes, and ends as one.

Each worker is `tunesmith train` (or `plan`) with torchrun's environment, so that what they do is what they do under
torchrun. This process computes nothing: it relays what the first worker says, passes signals on, and where a worker
ends with an error stops the others and raises that error as its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tunesmith.errors import InputError, InterruptedRun, RefusedError, TunesmithError
from tunesmith.planning import Plan
from tunesmith.progress import RELAY, Reporter
from tunesmith.recipe import Recipe
from tunesmith.stopping import COMMAND, asked, resume_command
from tunesmith.store.runs import Run
from tunesmith.train import parallel

LOOK_EVERY = 0.05  # seconds between looks at the workers
GRACE = 3.0  # seconds that the others have to end by themselves, once one has ended with an error


def wanted(recipe: Recipe) -> bool:
    """Whether the recipe asks for several processes, and this is not one of them yet."""
    return recipe.runtime.workers > 1 and not parallel.launched()


def train_in_workers(recipe: Recipe, folder: Path, *, resume: bool, reporter: Reporter) -> None:
    """Train a recipe in `runtime.workers` processes on this machine. Raises what the worker that failed raised."""
    words = ["--run", str(folder.resolve()), *(["--resume"] if resume else [])]
    workers, run = _work(recipe, "train", words, reporter), Run(folder)
    _raise_first_error(workers, resume_command(run) if run.exists() else None)


def plan_in_workers(recipe: Recipe, reporter: Reporter) -> Plan:
    """What a run will take in `runtime.workers` processes on this machine, measured in them. Raises what one raised."""
    workers = _work(recipe, "plan", [], reporter)
    facts = workers[0].said.get("result")
    if facts is None:
        _raise_first_error(workers, None)
    assert facts is not None, "the first worker ended well and said nothing"
    return Plan.from_json(facts, recipe.runtime.price_per_hour)


def _work(recipe: Recipe, command: str, words: Sequence[str], reporter: Reporter) -> list[_Worker]:
    """The workers of a command, ended."""
    count = recipe.runtime.workers
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as place:
        path = Path(place) / "recipe.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        line = [sys.executable, "-m", "tunesmith.cli", command, str(path), *words]
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
        workers = [_Worker.start(rank, count, line, store.port, reporter) for rank in range(count)]
        try:
            with _signals_passed_on(workers):
                _watch(workers)
        finally:
            for worker in workers:
                worker.kill()
    return workers


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    relay: threading.Thread
    killed: bool = False  # by this process
    said: dict[str, Any] = field(default_factory=dict)  # its error, and its result

    @staticmethod
    def start(rank: int, count: int, command: Sequence[str], port: int, reporter: Reporter) -> _Worker:
        ours, theirs = os.pipe()
        environment = {
            **os.environ,
            RELAY: str(theirs),
            COMMAND: asked(),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process holds the store, the first worker joins it
        }
        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=(theirs,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C comes to this process, which passes it on once
        )
        os.close(theirs)
        said: dict[str, Any] = {}
        relay = threading.Thread(target=_relay, args=(ours, reporter, said), daemon=True)
        relay.start()
        return _Worker(rank, process, relay, said=said)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.killed = True
            self.process.kill()
            self.process.wait()


def _relay(source: int, reporter: Reporter, said: dict[str, Any]) -> None:
    """What a worker says, until it ends: its progress to the reporter, its error and its result into `said`."""
    from rich.text import Text

    with os.fdopen(source, encoding="utf-8") as lines:
        for line in lines:
            try:
                name, *values = json.loads(line)
            except ValueError:  # cut off by its end
                return
            if name == "error":
                said.update(values[0])
            elif name == "result":
                said["result"] = values[0]
            elif name == "show":
                reporter.show(Text.from_ansi(values[0]))
            elif name in ("stage", "say", "advance"):
                getattr(reporter, name)(*values)


def _watch(workers: Sequence[_Worker]) -> None:
    """Until all are done; once one has ended with an error, the others are given a moment and killed."""
    deadline = None
    while any(worker.process.poll() is None for worker in workers):
        if deadline is None and any(worker.process.returncode for worker in workers):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(LOOK_EVERY)
    for worker in workers:
        worker.relay.join()


@contextmanager
def _signals_passed_on(workers: Sequence[_Worker]) -> Iterator[None]:
    """A signal to this process is one to each worker: they finish the step and save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def send(number: int, frame: object) -> None:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)

    before = {number: signal.signal(number, send) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_first_error(workers: Sequence[_Worker], resume: str | None) -> None:
    """The cause, not what followed from it: a worker that was killed, then an error, then a loss of another.

    resume  the command that goes on, where there is something to go on with
    """
    failed = [worker for worker in workers if worker.process.returncode and not worker.killed]
    if not failed:
        return
    cause = min(failed, key=lambda worker: (worker.said.get("lost", False), worker.process.returncode > 0, worker.rank))
    message, code = cause.said.get("message"), cause.process.returncode
    where = f"worker {cause.rank} of {len(workers)}"
    if message is None and code < 0:
        what = signal.Signals(-code).name
        raise TunesmithError(
            f"{where} was killed by {what} (the system does that where memory runs out), so the others were stopped"
            + ("" if resume is None else f"; continue with `{resume}`")
        )
    if message is None:
        raise TunesmithError(f"{where} failed, so the others were stopped; what it said is above")
    raise _error(code, str(message), cause.said.get("gate"))


def _error(code: int, message: str, gate: str | None) -> TunesmithError:
    """A worker's error as this process's own."""
    if gate is not None:
        return RefusedError(message, gate=gate)
    kinds = {kind.exit_code: kind for kind in (TunesmithError, InputError, InterruptedRun)}
    return kinds.get(code, TunesmithError)(message)
