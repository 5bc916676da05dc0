"""What is shared, split, moved and given back: the corners of the schedule, by what is answered and computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import CONTEXT, greedy, rival, tiny_engine

from tunesmith.engine import scheduler
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Request

SYSTEM = list(range(3, 33))
DOCUMENTS = [[40 + d, *range(33, 80)] for d in range(3)]


def remembering(**settings) -> Engine:
    engine = tiny_engine(**settings)
    engine._live = False
    return engine


@pytest.fixture
def short_tails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slots so short that every longer end moves into nodes."""
    monkeypatch.setattr(scheduler, "LONGEST_TAIL", 24)
    return


def computed(engine: Engine, requests: list[Request]) -> int:
    """Answers checked against transformers; how many prompt tokens went through the model."""
    answers = engine.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.ids == greedy(rival("llama"), list(request.prompt_ids), request.max_tokens)[0]
    return sum(answer.prompt_tokens - answer.cached_tokens for answer in answers)


def test_two_levels_of_sharing_are_each_computed_once() -> None:
    prompts = [SYSTEM + document + [80 + q] for document in DOCUMENTS for q in range(4)]
    tokens = computed(tiny_engine(), [Request(prompt_ids=p, max_tokens=4) for p in prompts])
    # One token of each prompt is always its own; a few more where a split comes too late to be worth a node.
    assert tokens <= len(SYSTEM) + sum(map(len, DOCUMENTS)) + 4 * len(prompts)


def test_a_conversation_goes_on_from_the_cache() -> None:
    engine = remembering()
    history = [5, 6, 7, *SYSTEM]
    for turn in range(3):
        answer = engine.generate([Request(prompt_ids=history, max_tokens=6, ignore_stop=True)])[0]
        if turn:
            assert answer.cached_tokens >= len(history) - 4
        history = [*history, *answer.ids, 50 + turn, 9]


def test_long_ends_move_into_nodes_and_go_on(short_tails: None) -> None:
    prompts = [[*SYSTEM, n] for n in range(40, 44)] + [list(range(n, n + 60)) for n in (3, 20)] + [[8], [8]]
    computed(tiny_engine(), [Request(prompt_ids=p, max_tokens=70) for p in prompts])


def test_every_token_of_a_long_answer_is_scored_again_and_again(short_tails: None) -> None:
    engine = remembering()
    prompt, answer = SYSTEM, list(range(20, 90)) * 2
    first = engine.score([(prompt, answer), (prompt, answer)])
    again = engine.logprobs(prompt, answer)
    assert [len(s) for s in (*first, again)] == [len(answer)] * 3
    assert first[0] == pytest.approx(again, abs=1e-4)
    assert first[1] == pytest.approx(again, abs=1e-4)


def test_a_prompt_already_answered_is_not_computed_again() -> None:
    engine = remembering()
    request = Request(prompt_ids=SYSTEM + DOCUMENTS[0], max_tokens=3)
    assert computed(engine, [request]) == len(request.prompt_ids)
    assert computed(engine, [request] * 5) == 5
    assert engine._core.scheduler.tree.bytes < 2 * CONTEXT * engine._core.scheduler.tree.spec.bytes_per_token
