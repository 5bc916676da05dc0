"""Choosing tokens: filters against their definitions, seeds, penalties, log-probabilities."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from tiny import greedy, rival, tiny_engine

from tunesmith.engine.request import Request
from tunesmith.engine.sampling import Sampling, choose

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
P = torch.softmax(LOGITS, -1).tolist()


@dataclass
class Drawer:
    """The part of a generation that sampling sees."""

    sampling: Sampling
    prompt: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(0))
    mask: torch.Tensor | None = None

    def allowed(self) -> torch.Tensor | None:
        return self.mask


def frequencies(sampling: Sampling, draws: int = 1000, logits: torch.Tensor = LOGITS) -> dict[int, float]:
    drawer = Drawer(sampling)
    counts = Counter(choose(logits.clone()[None], [drawer])[0].token for _ in range(draws))
    return {token: count / draws for token, count in counts.items()}


def expected(keep: list[int], temperature: float = 1.0) -> dict[int, float]:
    kept = torch.softmax(LOGITS[keep] / temperature, -1)
    return dict(zip(keep, kept.tolist(), strict=True))


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(temperature=1.0), expected([0, 1, 2, 3, 4, 5])),
        (Sampling(temperature=0.5), expected([0, 1, 2, 3, 4, 5], 0.5)),
        (Sampling(temperature=1.0, top_k=2), expected([0, 1])),
        # 0.561 + 0.206 < 0.8 <= 0.561 + 0.206 + 0.125: the token that crosses the mass is kept.
        (Sampling(temperature=1.0, top_p=0.8), expected([0, 1, 2])),
        (Sampling(temperature=1.0, top_p=1e-9), expected([0])),
        (Sampling(temperature=1.0, min_p=0.2), expected([i for i, p in enumerate(P) if p >= 0.2 * P[0]])),
        # The mass is that of the four kept by top-k, where two tokens reach 0.792; of all tokens they are 0.767.
        (Sampling(temperature=1.0, top_k=4, top_p=0.79), expected([0, 1])),
    ],
)
def test_frequencies_are_those_of_the_definition(sampling: Sampling, shares: dict[int, float]) -> None:
    found = frequencies(sampling)
    assert set(found) <= set(shares)
    for token, share in shares.items():
        assert found.get(token, 0.0) == pytest.approx(share, abs=0.06)


def test_a_flat_distribution_over_more_tokens_than_are_looked_at_first() -> None:
    logits = torch.zeros(3000)
    found = frequencies(Sampling(temperature=1.0), draws=300, logits=logits)
    assert len(found) > 250
    assert max(found) > 2000
    narrow = frequencies(Sampling(temperature=1.0, top_p=0.5), draws=300, logits=logits)
    assert 1000 < max(narrow) <= 1500


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    rows = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]])
    assert [c.token for c in choose(rows, [Drawer(Sampling()), Drawer(Sampling())])] == [1, 0]


def test_penalties_and_biases_change_the_logits_as_documented() -> None:
    cases = [
        (Drawer(Sampling(logit_bias={5: 10.0})), 5),
        (Drawer(Sampling(logit_bias={0: -100.0})), 1),
        (Drawer(Sampling(presence_penalty=1.5), generated=[0]), 1),  # 2.0 - 1.5 < 1.0
        (Drawer(Sampling(frequency_penalty=0.4), generated=[0, 0]), 0),  # 2.0 - 0.8 > 1.0
        (Drawer(Sampling(frequency_penalty=0.4), generated=[0, 0, 0]), 1),  # 2.0 - 1.2 < 1.0
        (Drawer(Sampling(presence_penalty=1.5), prompt=[0]), 0),  # the prompt is not the answer
        (Drawer(Sampling(repetition_penalty=2.5), prompt=[0]), 1),  # 2.0 / 2.5 < 1.0
        (Drawer(Sampling(), mask=torch.tensor([False, False, False, False, True, True])), 4),
    ]
    for drawer, token in cases:
        assert choose(LOGITS.clone()[None], [drawer])[0].token == token, drawer


def test_logprobs_are_the_models_own() -> None:
    sampling = Sampling(temperature=0.3, top_k=1, logit_bias={4: 50.0}, logprobs=True, top_logprobs=2)
    choice = choose(LOGITS.clone()[None], [Drawer(sampling)])[0]
    truth = torch.log_softmax(LOGITS, -1).tolist()
    assert choice.token == 4
    assert choice.logprob == pytest.approx(truth[4])
    assert choice.top == ((0, pytest.approx(truth[0])), (1, pytest.approx(truth[1])))


def test_a_seed_gives_the_same_answer_whatever_else_is_in_the_batch() -> None:
    engine = tiny_engine()
    seeded = Request(prompt_ids=[5, 6, 7], max_tokens=12, temperature=1.0, seed=11)
    others = [Request(prompt_ids=[5, 6, n], max_tokens=n, temperature=1.0) for n in (8, 9, 20)]
    alone = engine.generate([seeded])[0]
    assert engine.generate([others[0], seeded, *others[1:]])[1].ids == alone.ids
    assert engine.generate([Request(prompt_ids=[5, 6, 7], max_tokens=12, temperature=1.0, seed=12)])[0].ids != alone.ids


def test_n_answers_share_the_prompt_and_differ() -> None:
    engine = tiny_engine()
    request = Request(prompt_ids=list(range(3, 60)), max_tokens=10, temperature=1.5, seed=3, n=4, logprobs=3)
    answer = engine.generate([request])[0]
    answers = [answer, *answer.others]
    assert len(answers) == 4
    assert len({tuple(a.ids) for a in answers}) == 4
    assert sum(a.cached_tokens for a in answers) >= 3 * 56
    assert [a.ids for a in engine.generate([request])[0].others] == [a.ids for a in answer.others]
    for each in answers:
        scores = engine.logprobs(request.prompt_ids, each.ids)
        assert each.logprobs == pytest.approx(scores, abs=1e-4)
        assert [len(top) for top in each.top_logprobs] == [3] * len(each.ids)


def test_temperature_zero_is_greedy_with_a_seed_too() -> None:
    answer = tiny_engine().generate([Request(prompt_ids=[9, 4], max_tokens=6, seed=5, top_p=0.5)])[0]
    assert answer.ids == greedy(rival("llama"), [9, 4], 6)[0]
