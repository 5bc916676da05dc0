"""Every kernel on the machine's own processor, on tiles of other shapes, and as plain mathematics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tunesmith.cpu import attention, blocks, flash, narrow, nibbles, products, rowwise, writing

OWN = writing.processor()
# LLVM cuts vectors that a processor lacks into those it has, so wider ones are computed here too.
SHAPES = [None] if OWN is None else [OWN, writing.Processor(4, 6, 4), writing.Processor(16, 12, 2), None]


@pytest.fixture(params=SHAPES, ids=str)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> writing.Processor | None:
    for module in (attention, blocks, flash, narrow, nibbles, products, rowwise):
        monkeypatch.setattr(module, "processor", lambda: request.param)
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def kernels(on: writing.Processor | None) -> writing.Processor:
    """The processor, where there are kernels for it."""
    if on is None:
        pytest.skip("no kernels")
    return on


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
