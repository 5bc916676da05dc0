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
TEACHER_IDS = "teacher_ids"  # column [supervised, k]: the tokens that the teacher finds likeliest
TEACHER_LOGPROBS = "teacher_logprobs"  # column [supervised, k]: how likely
BASE_IDS, BASE_LOGPROBS = "base_ids", "base_logprobs"  # columns: the same of the base, for a leash to it
SURE = -1e-6  # a mean log-probability above it counts as this: the odds of certainty are infinite


@dataclass(frozen=True)
class LossOutput:
    """`total` is a sum over the micro-batch, to be divided by the step's weight; so are the metrics."""

    total: Tensor  # []
    metrics: Mapping[str, float] = field(default_factory=dict)


SumLoss = Callable[[Batch], LossOutput]


@dataclass(frozen=True)
class Surveyed:
    """A loss that depends on something of the whole step, by the weights as they are, which no gradient goes through.

    `survey` sums it up in its metrics; `given` makes the loss from their means.
    """

    survey: SumLoss
    given: Callable[[Mapping[str, float]], SumLoss]


Loss = SumLoss | Surveyed


def sft(batch: Batch) -> LossOutput:
    """Negative log-likelihood of the supervised tokens, each times its weight."""
    total = batch.scores.weighted_nll(batch.weights)
    correct = batch.scores.correct
    assert correct is not None
    return LossOutput(total, {"token_accuracy": float((batch.weights * correct).sum())})


def dpo(beta: float) -> SumLoss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    -log sigmoid(reward(chosen) - reward(rejected)), with reward(y) = beta * (log p(y | x) - log p_reference(y | x)).
    """

    def loss(batch: Batch) -> LossOutput:
        logprobs = batch.sum_by_sequence(batch.scores.logprobs())
        chosen, rejected = pairs(beta * (logprobs - batch.column(REFERENCE)))
        total = -logsigmoid(chosen - rejected).sum()
        return LossOutput(total, {**_preferred(chosen, rejected), "token_accuracy": _chosen_accuracy(batch)})

    return loss


def orpo(beta: float) -> SumLoss:
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


def kto(beta: float) -> Surveyed:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8), both weights 1.

    1 - sigmoid(reward(chosen) - z) and 1 - sigmoid(z - reward(rejected)), rewards as for DPO. z = beta * max(0, KL) is
    how far the model has moved anyway: the step's mean log-ratio of answers that belong to other prompts, the third
    sequence of each example.
    """

    def rewards(batch: Batch) -> Tensor:
        logprobs = batch.sum_by_sequence(batch.scores.logprobs())
        return beta * (logprobs - batch.column(REFERENCE)).view(-1, 3)

    def survey(batch: Batch) -> LossOutput:
        moved = rewards(batch)[:, 2].sum()
        return LossOutput(moved, {"moved": float(moved)})

    def given(means: Mapping[str, float]) -> SumLoss:
        z = max(0.0, means["moved"])

        def loss(batch: Batch) -> LossOutput:
            chosen, rejected, _ = rewards(batch).unbind(1)
            total = (2 - torch.sigmoid(chosen - z) - torch.sigmoid(z - rejected)).sum() / 2
            accuracy = _chosen_accuracy(batch, together=3)
            return LossOutput(total, {**_preferred(chosen, rejected), "token_accuracy": accuracy})

        return loss

    return Surveyed(survey, given)


def distillation(kl_share: float) -> SumLoss:
    """Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531).

    share * KL(teacher || student) + (1 - share) * NLL, summed over the answers' tokens. The teacher is known by its k
    likeliest tokens; all others count as one more, the remainder, as in the context distillation of Askell et al. 2021
    (arXiv:2112.00861): the sum over the k of p log(p / q), plus r log(r / s) with r = 1 - sum p and s = 1 - sum q.
    Joining tokens never raises a KL, so this is a lower bound of the whole one, exact where k is the vocabulary.
    """

    def loss(batch: Batch) -> LossOutput:
        entries, weights = batch.supervised()
        known, ids = batch.column(TEACHER_LOGPROBS), batch.column(TEACHER_IDS).long()
        targets = torch.as_tensor(batch.tree.targets, device=batch.device)[entries]
        logprobs, correct = batch.scores.of_tokens(entries, torch.cat((ids, targets[:, None]), dim=1))
        nll, logq = -logprobs[:, -1], logprobs[:, :-1]
        kl = _divergence(known.to(logq.dtype), logq)
        total = (weights * (kl_share * kl + (1 - kl_share) * nll)).sum()
        sums = {"kl": kl, "nll": nll, "token_accuracy": correct[:, -1].to(kl.dtype)}
        return LossOutput(total, {name: float((weights * each.detach()).sum()) for name, each in sums.items()})

    return loss


def leashed(loss: SumLoss, beta: float) -> SumLoss:
    """A loss over tokens, and beta * KL(base || tuned) at each of them: what is new is learned near the base.

    The old model's outputs on the new task's data, as in Learning without Forgetting (Li and Hoiem 2016,
    arXiv:1606.09282). The base is known as a teacher is in `distillation`: by its likeliest tokens and the remainder.
    """

    def near_base(batch: Batch) -> LossOutput:
        learned, (entries, weights) = loss(batch), batch.supervised()
        logq, _ = batch.scores.of_tokens(entries, batch.column(BASE_IDS).long())
        kl = (weights * _divergence(batch.column(BASE_LOGPROBS).to(logq.dtype), logq)).sum()
        own = {"nll": float(learned.total.detach()), **learned.metrics}
        return LossOutput(learned.total + beta * kl, {**own, "kl_to_base": float(kl.detach())})

    return near_base


def _divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL over k tokens and what remains of both distributions. logp, logq [n, k] -> [n]."""
    p = logp.exp()
    rest = (1 - p.sum(-1)).clamp(min=0)
    log_rest_q = torch.log(-torch.expm1(torch.logsumexp(logq, -1).clamp(max=SURE)))
    return (p * (logp - logq)).sum(-1) + torch.special.xlogy(rest, rest) - rest * log_rest_q


def pairs(by_sequence: Tensor) -> tuple[Tensor, Tensor]:
    """[sequences] -> the chosen ones' values and the rejected ones', [pairs] both."""
    chosen, rejected = by_sequence.view(-1, 2).unbind(1)
    return chosen, rejected


def _preferred(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """How far apart the rewards are, and of how many pairs the chosen answer has the higher one."""
    margin = (chosen - rejected).detach()
    return {"reward_margin": float(margin.sum()), "reward_accuracy": float((margin > 0).sum())}


def _chosen_accuracy(batch: Batch, together: int = 2) -> float:
    """The share of a chosen answer's tokens that were the likeliest, summed over the examples."""
    correct = batch.scores.correct
    assert correct is not None
    return float(batch.mean_by_sequence(correct.float())[::together].sum())
