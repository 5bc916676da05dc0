"""The real base through the real front door: packed weights, chat template, adapters from disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tunesmith.engine.body import PackedBody
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Request

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Count to five."]


@pytest.mark.base
def test_the_base_answers_as_transformers_does_and_remembers_a_conversation(base: Path) -> None:
    engine = Engine(base)
    assert isinstance(engine._core._body, PackedBody)
    requests = [Request(messages=[{"role": "user", "content": q}], max_tokens=8, logprobs=True) for q in QUESTIONS]
    answers = engine.generate(requests)
    rival = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for request, answer in zip(requests, answers, strict=True):
        prompt = engine.renderer.prompt_ids(request.messages)
        with torch.no_grad():
            logits = rival(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1].float()
        assert answer.ids == logits.argmax(-1).tolist()
        expected = torch.log_softmax(logits, -1)[range(len(answer.ids)), answer.ids]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
    turns = [
        *requests[0].messages,
        {"role": "assistant", "content": answers[0].text},
        {"role": "user", "content": "Why?"},
    ]
    assert engine.generate([Request(messages=turns, max_tokens=1)])[0].cached_tokens >= answers[0].prompt_tokens
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    held = engine.generate([Request(messages=requests[0].messages, schema=schema, max_tokens=20)])[0]
    assert json.loads(held.text)["city"] == "Paris"
