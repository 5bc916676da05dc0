"""Fixtures shared by all tests: the real pretrained base, converted once per machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CACHE = Path(__file__).resolve().parents[1] / ".cache"


@pytest.fixture(scope="session")
def base() -> Path:
    """The embedded base as a converted folder (fetched and converted on first use)."""
    os.environ.setdefault("TUNESMITH_HOME", str(CACHE / "home"))
    from tunesmith.models.catalogue import resolve

    return resolve("smollm2-135m-instruct").folder
