"""A training method is a loss: a micro-batch's scores in, a SUM out. The loop divides by the step's total weight.

So any micro-batching, and any number of processes, gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tunesmith.train.forward import Batch


@dataclass(frozen=True)
class LossOutput:
    """`total` is a sum over the micro-batch, to be divided by the step's weight; so are the metrics."""

    total: Tensor  # []
    metrics: Mapping[str, float] = field(default_factory=dict)


Loss = Callable[[Batch], LossOutput]


def sft(batch: Batch) -> LossOutput:
    """Negative log-likelihood of the supervised tokens, each times its weight."""
    total = batch.scores.weighted_nll(batch.weights)
    correct = batch.scores.correct
    assert correct is not None
    return LossOutput(total, {"token_accuracy": float((batch.weights * correct).sum())})
