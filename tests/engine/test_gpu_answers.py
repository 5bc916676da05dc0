"""The engine's greedy answers on any device are those of transformers on the CPU."""

from __future__ import annotations

import pytest
from test_same_as_transformers import prompts
from tiny import build, engine_over, greedy, rival

from devices import DEVICES
from tunesmith.engine.request import Request
from tunesmith.models.lora import wrap


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-window"])
def test_greedy_answers_on_a_device_are_those_of_transformers(device: str, family: str) -> None:
    engine = engine_over(wrap(build(family).to(device)))
    answers = engine.generate([Request(prompt_ids=p, max_tokens=12, logprobs=True) for p in prompts()])
    for prompt, answer in zip(prompts(), answers, strict=True):
        ids, logprobs = greedy(rival(family), prompt, 12)
        assert answer.ids == ids
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-3)
