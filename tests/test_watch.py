"""What a signal says while a run trains."""

import io
import os
import signal
import sys
from pathlib import Path

import pytest

from tunesmith.progress import terminal_reporter
from tunesmith.store.runs import Run
from tunesmith.watch import Watch


class Interrupted(io.FileIO):
    """A file that gets a signal while a line is being written to it."""

    def write(self, data) -> int | None:
        written = super().write(data)
        if b"in the middle" in bytes(data):
            os.kill(os.getpid(), signal.SIGTERM)
        return written


def test_a_signal_in_the_middle_of_a_line_is_heard_and_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Interrupted(tmp_path / "said", "w")
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(raw)))
    reporter = terminal_reporter()
    with Watch(Run(tmp_path), 3, reporter) as watch:
        reporter.say("in the middle")
        reporter.say("and after it")
    assert watch.hooks().should_stop()
    assert (tmp_path / "said").read_text().split("\n") == [
        "in the middle", "", "finishing this step, then saving; a second signal stops at once", "and after it", "",
    ]  # fmt: skip
