"""What a process is said to hold."""

from __future__ import annotations

import sys

import pytest
import torch

from tunesmith.models.memory import forget_peak, peak_bytes, release_memory, resident_bytes

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")


def test_the_peak_is_remembered_until_it_is_forgotten() -> None:
    release_memory()  # what earlier tests left behind would else be collected meanwhile
    forget_peak(CPU)
    before = peak_bytes(CPU)
    assert abs(before - resident_bytes()) < 50e6
    numbers = torch.ones(50_000_000)
    del numbers
    release_memory()
    assert peak_bytes(CPU) > before + 150e6
    assert resident_bytes() < before + 50e6
    forget_peak(CPU)
    assert peak_bytes(CPU) < before + 50e6
