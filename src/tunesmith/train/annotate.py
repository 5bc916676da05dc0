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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tunesmith.data.batches import Layout, make_step
from tunesmith.data.lazy import Lazy
from tunesmith.disk import flush, os_errors
from tunesmith.train import parallel
from tunesmith.train.forward import Batch, Body
from tunesmith.train.gradient import accumulate
from tunesmith.train.losses import BASE_IDS, BASE_LOGPROBS, REFERENCE, TEACHER_IDS, TEACHER_LOGPROBS, LossOutput
from tunesmith.types import TokenizedExample

AT_ONCE = 32  # examples laid out together
LEASH_TOP_K = 50  # tokens by which the base is known at each place
PLACE = "place"  # column: a sequence's index among all
LENGTHS = ".lengths"  # after the name of a column, in a file: how many rows of it belong to each sequence

# By name: [sequences, ...], or one array a sequence, [its supervised tokens, ...].
Columns = Mapping[str, npt.NDArray[Any] | Sequence[npt.NDArray[Any]]]
Annotate = Callable[[Body, Sequence[TokenizedExample], Layout, Callable[[int, int], None]], Columns]


def reference(
    body: Body, sequences: Sequence[TokenizedExample], layout: Layout, advance: Callable[[int, int], None]
) -> Mapping[str, npt.NDArray[Any]]:
    """The log-probability of each sequence's supervised tokens. `advance` is told (done, all), in examples."""
    found = np.zeros(len(sequences), dtype=np.float32)

    def note(batch: Batch) -> LossOutput:
        sums = batch.sum_by_sequence(batch.scores.logprobs())
        found[[int(each.columns[PLACE]) for each in batch.examples]] = sums.float().cpu().numpy()
        return LossOutput(sums.new_zeros(()))

    _visit(body, sequences, layout, note, advance)
    return {REFERENCE: found if layout.workers == 1 else parallel.add_up_array(found)}


def likeliest(
    body: Body,
    sequences: Sequence[TokenizedExample],
    layout: Layout,
    advance: Callable[[int, int], None],
    *,
    k: int,
    vocabulary: int,
) -> Columns:
    """What a teacher says at each supervised token: its k likeliest tokens below `vocabulary`, and how likely each is.

    The sequences are as the teacher sees them: with its prompt in front, which the tree computes once.
    """
    counts, k = [int(np.count_nonzero(each.weights)) for each in sequences], min(k, vocabulary)
    ends = np.cumsum(counts, dtype=np.int64)
    ids, logprobs = np.zeros((sum(counts), k), np.int32), np.zeros((sum(counts), k), np.float32)

    def note(batch: Batch) -> LossOutput:
        tokens, values = (each.cpu().numpy() for each in batch.scores.likeliest(k, vocabulary))
        entries = batch.supervised()[0].cpu().numpy()
        places = [int(each.columns[PLACE]) for each in batch.examples]
        rows = np.concatenate([np.arange(ends[place] - counts[place], ends[place]) for place in places])
        ids[rows], logprobs[rows] = tokens[entries], values[entries]
        return LossOutput(torch.zeros((), device=batch.device))

    _visit(body, sequences, layout, note, advance)
    everyone = (ids, logprobs) if layout.workers == 1 else map(parallel.add_up_array, (ids, logprobs))
    return dict(zip((TEACHER_IDS, TEACHER_LOGPROBS), (np.split(each, ends[:-1]) for each in everyone), strict=True))


def base_likeliest(
    body: Body, sequences: Sequence[TokenizedExample], layout: Layout, advance: Callable[[int, int], None]
) -> Columns:
    """The same of the base, which `body` is as it stands: what a leash to it compares with."""
    vocabulary = body.model.config.get_text_config().vocab_size
    found = likeliest(body, sequences, layout, advance, k=LEASH_TOP_K, vocabulary=vocabulary)
    return {BASE_IDS: found[TEACHER_IDS], BASE_LOGPROBS: found[TEACHER_LOGPROBS]}


def _visit(
    body: Body,
    sequences: Sequence[TokenizedExample],
    layout: Layout,
    note: Callable[[Batch], LossOutput],
    advance: Callable[[int, int], None],
) -> None:
    """Show every sequence to `note`, without gradients. It knows each by its column PLACE."""
    placed = with_columns(sequences, {PLACE: np.arange(len(sequences))})
    size, training = AT_ONCE * layout.together, body.model.training
    body.model.eval()  # no dropout
    with torch.no_grad():
        for start in range(0, len(placed), size):
            accumulate(body, make_step(0, 0.0, [*placed[start : start + size]], layout), note, backward=False)
            advance(min(start + size, len(placed)) // layout.together, len(placed) // layout.together)
    body.model.train(training)


def with_columns(sequences: Sequence[TokenizedExample], columns: Columns) -> Lazy[TokenizedExample]:
    """The sequences, each with its row of the columns."""

    def sequence(i: int) -> TokenizedExample:
        each = sequences[i]
        return replace(each, columns={**each.columns, **{name: values[i] for name, values in columns.items()}})

    return Lazy(len(sequences), sequence)


def save_columns(path: Path, columns: Columns, of: str = "") -> None:
    """Written beside its place and renamed, so that what bears the name is whole. `of` names what they were made of."""
    beside = path.with_name(f".{path.name}.partial")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, values in columns.items():
        if not isinstance(values, np.ndarray):
            arrays[name + LENGTHS] = np.array([len(each) for each in values])
            values = np.concatenate(values)
        arrays[name] = np.ascontiguousarray(values)
    with os_errors(beside):
        save_file(arrays, beside, metadata={"of": of})
    flush(beside)
    beside.rename(path)


def load_columns(path: Path, sequences: int, of: str = "") -> Columns | None:
    """What `save_columns` wrote; None where there is none, or it is damaged or of other rows."""
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("of", "") != of:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError):
        return None
    columns: dict[str, Any] = {name: values for name, values in arrays.items() if not name.endswith(LENGTHS)}
    for name in columns:
        if name + LENGTHS in arrays:
            columns[name] = np.split(arrays[name], np.cumsum(arrays[name + LENGTHS])[:-1])
    return columns if all(len(values) == sequences for values in columns.values()) else None
