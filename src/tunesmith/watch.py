"""What is kept of a run while it trains: a line of metrics a step, checkpoints; and how a signal ends it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from math import isfinite
from types import FrameType

from tunesmith.progress import Reporter
from tunesmith.store.runs import Run
from tunesmith.train import parallel
from tunesmith.train.checkpoint import save_checkpoint
from tunesmith.train.loop import EvalMetrics, Hooks, StepMetrics, TrainState


class Watch:
    """Writes metrics and checkpoints as they come, and turns a signal into a request to stop after the step."""

    def __init__(self, run: Run, steps: int, reporter: Reporter) -> None:
        self._run, self._steps, self._reporter = run, steps, reporter
        self._asked_to_stop = False
        self._held_out = ""
        self._before: dict[int, object] = {}

    def hooks(self) -> Hooks:
        return Hooks(self._step, self._eval, self._checkpoint, lambda: any(parallel.gather(self._asked_to_stop)))

    def __enter__(self) -> Watch:
        path = self._run.metrics if parallel.is_first() else os.devnull
        self._file = open(path, "a", encoding="utf-8")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # nobody else's
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._file.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        words = "finishing this step, then saving; a second signal stops at once"
        try:
            self._reporter.say(words)
        except RuntimeError:  # it came in the middle of a line, which no other can be written into
            os.write(sys.stderr.fileno(), f"\n{words}\n".encode())

    def _step(self, metrics: StepMetrics) -> None:
        row = dataclasses.asdict(metrics)
        measures = row.pop("measures")
        self._write({**row, **measures})
        rate = metrics.tokens / metrics.seconds
        text = f"loss {metrics.loss:.3f}  {rate:.0f} tokens/s{self._held_out}"
        if metrics.skipped:
            self._reporter.say(f"step {metrics.step} had a loss or gradient that is not a finite number; skipped")
        self._reporter.advance(metrics.step, self._steps, text)

    def _eval(self, metrics: EvalMetrics) -> None:
        row = dataclasses.asdict(metrics)
        measures = {f"held_out_{name}": value for name, value in row.pop("measures").items()}
        self._write({**row, **measures})
        self._held_out = f"  held-out loss {metrics.held_out_loss:.3f}"
        if metrics.score is not None:
            self._held_out += f", score {metrics.score:.2f}"

    def _checkpoint(self, state: TrainState) -> None:
        if parallel.is_first():
            os.fsync(self._file.fileno())  # no checkpoint without the rows of its steps
        save_checkpoint(self._run.checkpoints, state)

    def _write(self, row: dict[str, object]) -> None:
        known = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()}
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()
