"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, seeds, and log-probabilities.

Every random choice is one uniform number of the sequence's own generator, put through the inverse of the cumulative
distribution over the likeliest tokens first: the answer depends on the request and its seed, not on the batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

CANDIDATES = 256  # tokens looked at first; more only where these have too little mass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence picks its tokens; the fields are those of `Request`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def reshapes(self) -> bool:
        """Whether the logits themselves are changed before choosing."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        )


class Samplable(Protocol):
    """What sampling needs of a sequence."""

    sampling: Sampling
    random: random.Random
    prompt: list[int]
    generated: list[int]

    def allowed(self) -> Tensor | None:
        """[vocabulary] bool: the tokens a constraint permits next, None for all."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and what the model itself thought of it (where asked)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, sequences: Sequence[Samplable]) -> list[Choice]:
    """One token for each sequence. logits [sequences, vocabulary] float32, changed in place."""
    facts = _logprobs(logits, sequences)
    for row, sequence in zip(logits, sequences, strict=True):
        if sequence.sampling.reshapes:
            _reshape(row, sequence)
        allowed = sequence.allowed()
        if allowed is not None:
            row.masked_fill_(~allowed, -torch.inf)
    tokens = _likeliest(logits)
    for index, sequence in enumerate(sequences):
        if sequence.sampling.temperature > 0:
            tokens[index] = _sample(logits[index], sequence.sampling, sequence.random.random())
    return [
        Choice(token) if fact is None else Choice(token, float(fact[0][token]), fact[1])
        for token, fact in zip(tokens, facts, strict=True)
    ]


def _likeliest(logits: Tensor) -> list[int]:
    """The first of the greatest in each row. numpy's argmax uses vector instructions on a CPU, torch's does not."""
    if logits.device.type == "cpu":
        return logits.numpy().argmax(-1).tolist()
    return logits.argmax(-1).tolist()


def _logprobs(
    logits: Tensor, sequences: Sequence[Samplable]
) -> list[tuple[Tensor, tuple[tuple[int, float], ...]] | None]:
    """For the sequences that want them: [vocabulary] log-probabilities, and the likeliest alternatives."""
    found: list[tuple[Tensor, tuple[tuple[int, float], ...]] | None] = []
    for row, sequence in zip(logits, sequences, strict=True):
        if not sequence.sampling.logprobs:
            found.append(None)
            continue
        logprobs = torch.log_softmax(row, -1)
        values, tokens = logprobs.topk(min(sequence.sampling.top_logprobs, len(row)))
        found.append((logprobs, tuple(zip(tokens.tolist(), values.tolist(), strict=True))))
    return found


def _reshape(row: Tensor, sequence: Samplable) -> None:
    """Penalties and biases on one row of logits, in place."""
    sampling = sequence.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt, *sequence.generated}), device=row.device)
        values = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.generated and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(sequence.generated)
        tokens = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
    for token, bias in sampling.logit_bias.items():
        row[token] += bias


def _sample(row: Tensor, sampling: Sampling, uniform: float) -> int:
    """The token at `uniform` of the cumulative distribution of one row of logits, filters applied in turn."""
    row = row / sampling.temperature
    limit = min(sampling.top_k or len(row), len(row))
    normaliser = row.logsumexp(-1)
    if limit < len(row):  # top-k comes first: the others' filters see the kept tokens' distribution
        values, tokens = row.topk(limit)
        normaliser = values.logsumexp(-1)
    else:
        values, tokens = row.topk(min(CANDIDATES, len(row)))
    probabilities = (values - normaliser).exp().double()
    if len(values) < limit and not _enough(probabilities, sampling, uniform):
        values, tokens = row.sort(descending=True, stable=True)
        probabilities = (values - normaliser).exp().double()
    cumulative = probabilities.cumsum(0)
    if sampling.top_p == 1.0 and sampling.min_p == 0.0:
        count, total = len(values), 1.0
    else:
        kept = (cumulative - probabilities) < sampling.top_p  # the token that crosses the mass is kept
        kept &= probabilities >= sampling.min_p * probabilities[0]
        count = max(1, int(kept.sum()))  # probabilities fall, so the kept ones come first
        total = float(cumulative[count - 1])
    place = int(torch.searchsorted(cumulative[:count], uniform * total, right=True))
    return int(tokens[min(place, count - 1)])


def _enough(probabilities: Tensor, sampling: Sampling, uniform: float) -> bool:
    """Whether the candidates hold every token that the filters keep, or at least the one that will be drawn."""
    mass = float(probabilities.sum())
    if mass >= sampling.top_p or float(probabilities[-1]) < sampling.min_p * float(probabilities[0]):
        return True
    return sampling.top_p == 1.0 and sampling.min_p == 0.0 and uniform < mass
