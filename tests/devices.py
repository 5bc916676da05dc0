"""The devices a contract holds on: each there is, and the CPU always. `pytest -m gpu` runs those of a GPU alone."""

from __future__ import annotations

import pytest
import torch


def _gpu(name: str, there: bool):
    return pytest.param(name, marks=[pytest.mark.gpu, pytest.mark.skipif(not there, reason=f"no {name} here")])


DEVICES = ["cpu", _gpu("cuda", torch.cuda.is_available()), _gpu("mps", torch.backends.mps.is_available())]
