"""Columns: what a loss needs to know of the weights as they are before the first step, computed once.

The reference of a preference loss is the model training starts from: the base under a new adapter (whose B is zero),
the earlier tune under `adapter.init_from`, the base's own weights in full fine-tuning. So there is never a second model
in memory, and the numbers must be there before the first update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tunesmith.data.batches import Layout, make_step
from tunesmith.disk import flush, os_errors
from tunesmith.train import parallel
from tunesmith.train.forward import Batch, Body
from tunesmith.train.gradient import accumulate
from tunesmith.train.losses import REFERENCE, LossOutput
from tunesmith.types import TokenizedExample

AT_ONCE = 32  # examples laid out together
PLACE = "place"  # column: a sequence's index among all

Columns = Mapping[str, npt.NDArray[Any]]  # by name, [sequences, ...]
Annotate = Callable[[Body, Sequence[TokenizedExample], Layout, Callable[[int, int], None]], Columns]


def reference(
    body: Body, sequences: Sequence[TokenizedExample], layout: Layout, advance: Callable[[int, int], None]
) -> Columns:
    """The log-probability of each sequence's supervised tokens. `advance` is told (done, all), in examples."""
    found = np.zeros(len(sequences), dtype=np.float32)

    def note(batch: Batch) -> LossOutput:
        sums = batch.sum_by_sequence(batch.scores.logprobs())
        found[[int(each.columns[PLACE]) for each in batch.examples]] = sums.float().cpu().numpy()
        return LossOutput(sums.new_zeros(()))

    placed = with_columns(sequences, {PLACE: np.arange(len(sequences))})
    size, training = AT_ONCE * layout.together, body.model.training
    body.model.eval()  # no dropout
    with torch.no_grad():
        for start in range(0, len(placed), size):
            accumulate(body, make_step(0, 0.0, placed[start : start + size], layout), note, backward=False)
            advance(min(start + size, len(placed)) // layout.together, len(placed) // layout.together)
    body.model.train(training)
    return {REFERENCE: found if layout.workers == 1 else parallel.add_up_array(found)}


def with_columns(sequences: Sequence[TokenizedExample], columns: Columns) -> list[TokenizedExample]:
    """The sequences, each with its row of the columns."""
    return [
        replace(each, columns={**each.columns, **{name: values[i] for name, values in columns.items()}})
        for i, each in enumerate(sequences)
    ]


def save_columns(path: Path, columns: Columns) -> None:
    """Written beside its place and renamed, so that what bears the name is whole."""
    beside = path.with_name(f".{path.name}.partial")
    with os_errors(beside):
        save_file({name: np.ascontiguousarray(values) for name, values in columns.items()}, beside)
    flush(beside)
    beside.rename(path)


def load_columns(path: Path, sequences: int) -> Columns | None:
    """What `save_columns` wrote; None where there is none, or it is damaged or of other rows."""
    try:
        columns = load_file(path)
    except (OSError, SafetensorError):
        return None
    return columns if all(len(values) == sequences for values in columns.values()) else None
