"""What long work says while it runs. `Reporter` is silent; `terminal_reporter` writes to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

RELAY = "TUNESMITH_RELAY"  # in a worker's environment: the open file on which it tells who started it


class Reporter:
    """Receives the progress of long work; does nothing with it."""

    def stage(self, title: str) -> None:
        """A new part of the work begins."""

    def say(self, text: str) -> None:
        """A sentence for the person."""

    def show(self, renderable: Any) -> None:
        """Something rich can print."""

    def advance(self, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` units of the current stage are finished."""


def terminal_reporter(*, quiet: bool = False) -> Reporter:
    """A live bar on a terminal, plain lines otherwise. `quiet` keeps tables and bars off, for --json.

    Of several workers only the first says anything, to the process that started them where there is one.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return Reporter()
    if RELAY in os.environ:
        return _RelayReporter()
    if sys.stderr.isatty() and not quiet:
        return _LiveReporter()
    return _LineReporter(quiet=quiet)


def relay(*event: Any) -> bool:
    """Tell the process that started this worker; False where there is none. What it is told: workers.py."""
    if RELAY not in os.environ:
        return False
    os.write(int(os.environ[RELAY]), json.dumps(event).encode() + b"\n")
    return True


class _RelayReporter(Reporter):
    """Says everything to the process that started this worker, which has the terminal."""

    def stage(self, title: str) -> None:
        relay("stage", title)

    def say(self, text: str) -> None:
        relay("say", text)

    def show(self, renderable: Any) -> None:
        from rich.console import Console

        with (console := Console(width=120, color_system="standard", force_terminal=True)).capture() as captured:
            console.print(renderable)
        relay("show", captured.get().rstrip("\n"))

    def advance(self, done: int, total: int, detail: str = "") -> None:
        relay("advance", done, total, detail)


class _LineReporter(Reporter):
    """Plain lines, at most one every few seconds while a stage advances."""

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._clock = _Clock()

    def stage(self, title: str) -> None:
        self._clock.restart()
        self._last = 0.0
        self._title = title
        self._line(f"== {title}")

    def say(self, text: str) -> None:
        self._line(text)

    def show(self, renderable: Any) -> None:
        if not self._quiet:
            from rich.console import Console

            Console(stderr=True, width=120).print(renderable)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self._last < self.SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = self._clock.left(done, total)
        self._line(f"{self._title} {done}/{total}  {detail}  {left}".rstrip())

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _LiveReporter(Reporter):
    """One live bar a stage."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._clock = _Clock()
        self._bar: Any = None
        self._title = ""

    def stage(self, title: str) -> None:
        self._close()
        self._title = title
        self._clock.restart()
        self._console.print(f"[bold]{title}[/bold]")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def show(self, renderable: Any) -> None:
        self._console.print(renderable)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        left = self._clock.left(done, total)
        self._bar.update(self._task, completed=done, total=total, description=f"{detail}  {left}")
        if done >= total:
            self._close()
            self._console.print(f"  {done}/{total}  {detail}  {self._clock.elapsed()}", markup=False, highlight=False)
            self._clock.restart()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Clock:
    """Time since a stage began, and what is left by the rate so far."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._began = time.monotonic()

    def elapsed(self) -> str:
        return f"in {_duration(time.monotonic() - self._began)}"

    def left(self, done: int, total: int) -> str:
        if not 0 < done < total:
            return self.elapsed() if done >= total else ""
        return f"{_duration((time.monotonic() - self._began) / done * (total - done))} left"


def _duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 04 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
