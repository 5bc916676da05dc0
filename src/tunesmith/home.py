"""Where state lives, and whether the network may be used."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """$TUNESMITH_HOME, by default ~/.tunesmith: `models/`, `runs/`, `cache/`, `tunesmith.db`. Not created here."""
    return Path(os.environ.get("TUNESMITH_HOME") or Path.home() / ".tunesmith").expanduser()


def offline() -> bool:
    """True where TUNESMITH_OFFLINE forbids every network access."""
    return os.environ.get("TUNESMITH_OFFLINE", "") not in ("", "0")
