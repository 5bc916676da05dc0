"""A training method is a loss: a micro-batch's scores in, a SUM out. The loop divides by the step's total weight.

So any micro-batching, and any number of processes, gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.train.forward import Batch

REFERENCE = "reference"  # column: a sequence's log-probability under the weights that training starts from
SURE = -1e-6  # a mean log-probability above it counts as this: the odds of certainty are infinite


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


def dpo(beta: float) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    -log sigmoid(reward(chosen) - reward(rejected)), with reward(y) = beta * (log p(y | x) - log p_reference(y | x)).
    """

    def loss(batch: Batch) -> LossOutput:
        logprobs = batch.sum_by_sequence(batch.scores.logprobs())
        chosen, rejected = pairs(beta * (logprobs - batch.column(REFERENCE)))
        total = -logsigmoid(chosen - rejected).sum()
        return LossOutput(total, {**_preferred(chosen, rejected), "token_accuracy": _chosen_accuracy(batch)})

    return loss


def orpo(beta: float) -> Loss:
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, equations 4 to 7); needs no reference.

    -log p(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)), with odds(y) = p(y) / (1 - p(y)) and
    p(y) the geometric mean of the answer's token probabilities.
    """

    def loss(batch: Batch) -> LossOutput:
        logprobs = batch.mean_by_sequence(batch.scores.logprobs())
        odds = logprobs - torch.log(-torch.expm1(logprobs.clamp(max=SURE)))
        chosen, rejected = pairs(odds)
        total = -(pairs(logprobs)[0] + beta * logsigmoid(chosen - rejected)).sum()
        rewards = _preferred(*pairs(beta * logprobs))
        return LossOutput(total, {**rewards, "token_accuracy": _chosen_accuracy(batch)})

    return loss


def pairs(by_sequence: Tensor) -> tuple[Tensor, Tensor]:
    """[sequences] -> the chosen ones' values and the rejected ones', [pairs] both."""
    chosen, rejected = by_sequence.view(-1, 2).unbind(1)
    return chosen, rejected


def _preferred(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """How far apart the rewards are, and of how many pairs the chosen answer has the higher one."""
    margin = (chosen - rejected).detach()
    return {"reward_margin": float(margin.sum()), "reward_accuracy": float((margin > 0).sum())}


def _chosen_accuracy(batch: Batch) -> float:
    """The share of a chosen answer's tokens that were the likeliest, summed over the pairs."""
    correct = batch.scores.correct
    assert correct is not None
    return float(pairs(batch.mean_by_sequence(correct.float()))[0].sum())
