"""Guessed tokens: the answers are exactly those without guesses, in fewer steps, and only where guesses pay."""

from __future__ import annotations

import pytest
import torch
from test_adapters import carrying
from tiny import CONFIGS, build, engine_over, greedy, rival, tiny_engine

from tunesmith.engine import scheduler, speculation
from tunesmith.engine.core import Core
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Request
from tunesmith.engine.speculation import Guesser, Speculation
from tunesmith.models.lora import LoraModel, wrap

PHRASE = [40, 41, 42, 43, 44, 45]
PROMPTS = [[9, *PHRASE, 60], [*PHRASE, 7, *PHRASE], [3], [*range(5, 45), 60], [50, 51] * 8]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that was run."""
    seen: list[int] = []
    run = Core._run

    def counting(self: Core, plan: scheduler.Plan) -> torch.Tensor:
        seen.append(sum(chunk.rows for chunk in plan.chunks))
        return run(self, plan)

    monkeypatch.setattr(Core, "_run", counting)
    return seen


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess at every occasion, however seldom it is right."""
    monkeypatch.setattr(speculation, "ROWS_FREE", 10_000)


def looping(lora: LoraModel) -> LoraModel:
    """A model that soon repeats itself: its layers hardly change what comes in."""
    for name, weight in lora.model.named_parameters():
        if "layers" in name and "norm" not in name:
            weight.data.mul_(0.1)
    return lora


@pytest.mark.parametrize("family", CONFIGS)
def test_guesses_never_change_an_answer(family: str, eager: None) -> None:
    engine = tiny_engine(family)
    requests = [Request(prompt_ids=p, max_tokens=30, logprobs=True) for p in PROMPTS]
    for answer, prompt in zip(engine.generate(requests), PROMPTS, strict=True):
        ids, logprobs = greedy(rival(family), prompt, 30)
        assert answer.ids == ids
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_guesses_never_change_a_mixed_batch(packed: bool, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [(p, a) for p in PROMPTS for a in (None, "a", "b", "e")]
    requests = [Request(prompt_ids=p, adapter=a, max_tokens=20, ignore_stop=True) for p, a in asked]
    requests += [Request(prompt_ids=p, max_tokens=20, temperature=1.0, seed=3, adapter="a") for p in PROMPTS]
    guessed = engine_over(looping(carrying()), packed=packed).generate(requests)
    monkeypatch.setattr(speculation, "LONGEST", 0)
    assert [a.ids for a in guessed] == [
        a.ids for a in engine_over(looping(carrying()), packed=packed).generate(requests)
    ]


def test_an_answer_that_repeats_takes_fewer_steps(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt_ids=[5, 6, 7], max_tokens=60, ignore_stop=True)
    quick = engine_over(looping(wrap(build("llama")))).generate([request])[0]
    taken = len(steps)
    monkeypatch.setattr(speculation, "LONGEST", 0)
    steps.clear()
    slow = engine_over(looping(wrap(build("llama")))).generate([request])[0]
    assert quick.ids == slow.ids
    assert len(steps) == 60
    assert taken < 30


def test_stops_lengths_and_stop_strings_cut_guesses_short(eager: None) -> None:
    engine = engine_over(looping(wrap(build("llama"))))
    whole = engine.generate([Request(prompt_ids=[5, 6, 7], max_tokens=40, ignore_stop=True)])[0]
    for length in range(1, 40, 3):
        answer = engine.generate([Request(prompt_ids=[5, 6, 7], max_tokens=length, ignore_stop=True)])[0]
        assert (answer.ids, answer.finish_reason) == (whole.ids[:length], "length")
    stop = whole.text[18:21]
    cut = engine.generate([Request(prompt_ids=[5, 6, 7], max_tokens=40, ignore_stop=True, stop=stop)])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    streamed = list(engine.stream(Request(prompt_ids=[5, 6, 7], max_tokens=40, ignore_stop=True)))
    assert [token for delta in streamed for token in delta.ids] == whole.ids


def test_a_conversation_goes_on_from_guessed_tokens(eager: None) -> None:
    """What guesses left in the cache is what the tokens would have left."""
    engine = engine_over(looping(wrap(build("llama"))))
    engine._live = False
    first = engine.generate([Request(prompt_ids=[5, 6, 7], max_tokens=30, ignore_stop=True)])[0]
    history = [5, 6, 7, *first.ids, 9, 10]
    again = engine.generate([Request(prompt_ids=history, max_tokens=20, logprobs=True, ignore_stop=True)])[0]
    assert again.cached_tokens == len(history) - 3
    fresh = engine_over(looping(wrap(build("llama")))).score([(history, again.ids)])[0]
    assert again.logprobs == pytest.approx(fresh, abs=1e-4)


def test_guesses_are_made_only_where_they_pay() -> None:
    shared = Speculation()
    guesser = Guesser(shared, None, PHRASE * 3)
    assert guesser.guess(sequences=1, room=4) == PHRASE[:4]
    assert guesser.guess(sequences=64, room=5) == [], "half a chance does not pay in a full step"
    guesser.see(PHRASE * 20)
    assert guesser.guess(sequences=64, room=3) == PHRASE[:3], "guesses that were always right do"
    other = Guesser(shared, None, [1, 2, *PHRASE[:2]])
    assert other.guess(sequences=1, room=2) == PHRASE[2:4], "answers of one adapter learn from each other"
    assert Guesser(shared, "another", [1, 2, *PHRASE[:2]]).guess(sequences=1, room=2) == []
    shared.forget()
    assert other.guess(sequences=1, room=2) == []


def test_what_is_remembered_of_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "REMEMBERED", 400)
    shared = Speculation()
    for start in range(50):
        Guesser(shared, None, [start]).see([start * 100 + i for i in range(60)])
    assert len(shared._fresh) + len(shared._old) <= 400 + 3


def test_an_engine_with_little_room_guesses_no_further(eager: None) -> None:
    limit = 4 * 2 * 2 * 8 * 4 * 64 * 2
    tight = engine_over(looping(wrap(build("llama"))), memory_limit=limit)
    requests = [Request(prompt_ids=[n, n], max_tokens=50, ignore_stop=True) for n in range(3, 9)]
    roomy: Engine = engine_over(looping(wrap(build("llama"))))
    assert [a.ids for a in tight.generate(requests)] == [a.ids for a in roomy.generate(requests)]
