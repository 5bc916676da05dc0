"""A training that is asked to stop, as by a signal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tunesmith.train.loop import StepMetrics
from tunesmith.watch import Watch


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Trainings in here are asked to stop once step `step` is done."""
    record = Watch._step

    def stop(self: Watch, metrics: StepMetrics) -> None:
        record(self, metrics)
        self._asked_to_stop = metrics.step == step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "_step", stop)
        yield
