"""The engine says what transformers says: any decoder, alone or in a batch, with or without a shared prefix."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import CONFIGS, STOP, greedy, rival, tiny_engine

from tunesmith.engine.request import Request

FAMILIES = sorted(CONFIGS)


def prompts() -> list[list[int]]:
    """Nothing shared; a shared block of 40 with ends of different lengths; one the beginning of another; equal ones."""
    chance = random.Random(3)
    block = [chance.randrange(3, 97) for _ in range(40)]

    def some(count: int) -> list[int]:
        return [chance.randrange(3, 97) for _ in range(count)]

    behind = [block + some(n) for n in (1, 2, 7, 19, 30)]
    return [some(1), some(5), some(21), *behind, behind[-1][:55], behind[3], block]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_and_logprobs_are_those_of_transformers(family: str, packed: bool) -> None:
    engine = tiny_engine(family, packed=packed)
    answers = engine.generate([Request(prompt_ids=p, max_tokens=12, logprobs=True) for p in prompts()])
    for prompt, answer in zip(prompts(), answers, strict=True):
        ids, logprobs = greedy(rival(family), prompt, 12)
        assert answer.ids == ids
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert answer.finish_reason == ("stop" if ids[-1] == STOP else "length")
    assert max(a.cached_tokens for a in answers) >= 40, "the shared block was computed more than once"


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-window", "gpt2"])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_answers_do_not_depend_on_the_batch(family: str, max_batch: int) -> None:
    """Requests join and leave while others run, and prompts are cut into chunks by a small budget."""
    engine = tiny_engine(family, max_batch=max_batch)
    engine._core.scheduler.step_tokens = 13
    answers = engine.generate([Request(prompt_ids=p, max_tokens=9) for p in prompts()])
    assert [a.ids for a in answers] == [greedy(rival(family), p, 9)[0] for p in prompts()]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_given_answers(family: str) -> None:
    engine = tiny_engine(family)
    pairs = [(p[: len(p) // 2 + 1], p[len(p) // 2 + 1 :]) for p in prompts() if len(p) > 2]
    scores = engine.score(pairs)
    for (prompt, answer), score in zip(pairs, scores, strict=True):
        with torch.no_grad():
            logits = rival(family)(torch.tensor([prompt + answer]), use_cache=False).logits[0].float()
        expected = torch.log_softmax(logits, -1)[torch.arange(len(prompt) - 1, len(prompt + answer) - 1), answer]
        assert score == pytest.approx(expected.tolist(), abs=1e-4)
    assert engine.logprobs(*pairs[0]) == pytest.approx(scores[0], abs=1e-4)
