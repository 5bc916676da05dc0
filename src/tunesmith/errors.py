"""Every error a user can meet.

TunesmithError                 exit 1   something failed inside
├── LostWorkerError            exit 1   another process of the run ended; its own error says why
├── InputError                 exit 2   bad input or usage: one sentence with file, line and remedy
├── RefusedError               exit 3   a gate said no; says which, and how to override it where that is sane
└── InterruptedRun             exit 130 stopped by a signal; resumable
"""

from __future__ import annotations

from pathlib import Path


class TunesmithError(Exception):
    """Something failed inside; the message is a sentence for the user."""

    exit_code = 1


class LostWorkerError(TunesmithError):
    """Another process of the same run ended, so this one had to; not the cause of anything."""


class InputError(TunesmithError):
    """Bad input or usage. `file` and `line` (1-based) lead the message when given."""

    exit_code = 2

    def __init__(self, message: str, *, file: str | Path | None = None, line: int | None = None) -> None:
        self.reason, self.file, self.line = message, None if file is None else str(file), line
        where = "" if file is None else str(file) + (f" line {line}" if line is not None else "") + ": "
        super().__init__(where + message)


class RefusedError(TunesmithError):
    """A gate refused to go on. `gate` names it."""

    exit_code = 3

    def __init__(self, message: str, *, gate: str) -> None:
        self.gate = gate
        super().__init__(message)


class InterruptedRun(TunesmithError):
    """The run was stopped by a signal after saving; the message is the command that resumes it."""

    exit_code = 130
