"""Where answers end: stop tokens, stop strings over token borders, lengths, and streams."""

from __future__ import annotations

import pytest
from tiny import CONTEXT, LetterRenderer, build, tiny_engine

from tunesmith.engine.completer import TextTracker
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Request
from tunesmith.models.lora import wrap

PROMPT = [9, 8, 7]
LETTERS = LetterRenderer()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture(scope="module")
def text(engine: Engine) -> str:
    return engine.generate([Request(prompt_ids=PROMPT, max_tokens=14, ignore_stop=True)])[0].text


class Bytes:
    """A token is a byte of UTF-8, as in byte-level vocabularies."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_stop_string_over_token_borders_ends_the_answer_and_is_not_in_it(engine: Engine, text: str) -> None:
    stop = text[5:8]
    answer = engine.generate([Request(prompt_ids=PROMPT, max_tokens=14, ignore_stop=True, stop=["no such", stop])])[0]
    assert answer.text == text[: text.index(stop)]
    assert answer.finish_reason == "stop"
    assert LETTERS.decode(answer.ids) == text[: text.index(stop) + 3]


def test_the_earliest_of_several_stop_strings_counts() -> None:
    tracker = TextTracker(LETTERS, ["cd", "abc"])
    assert not tracker.see([ord(c) - 32 for c in "xa"])
    assert tracker.see([ord(c) - 32 for c in "xabcd"])
    assert tracker.text == "x"


def test_what_may_become_a_stop_string_is_held_back(engine: Engine, text: str) -> None:
    stop = text[4:7]
    deltas = list(engine.stream(Request(prompt_ids=PROMPT, max_tokens=14, ignore_stop=True, stop=stop)))
    assert "".join(d.text for d in deltas) == deltas[-1].answer.text == text[: text.index(stop)]


def test_a_stream_gives_every_token_and_text_once(engine: Engine) -> None:
    request = Request(prompt_ids=PROMPT, max_tokens=14, logprobs=True, temperature=1.0, seed=1, n=2)
    whole = engine.generate([request])[0]
    deltas = list(engine.stream(request))
    for index, answer in enumerate([whole, *whole.others]):
        mine = [d for d in deltas if d.index == index]
        assert "".join(d.text for d in mine) == answer.text
        assert [token for d in mine for token in d.ids] == answer.ids
        assert mine[-1].answer.ids == answer.ids
        assert all(d.answer is None for d in mine[:-1])


def test_a_character_over_several_tokens_comes_out_whole() -> None:
    tracker = TextTracker(Bytes())
    seen = []
    ids = list("aé😀!".encode())
    for end in range(1, len(ids) + 1):
        tracker.see(ids[:end])
        seen.append(tracker.certain)
    assert seen == ["a", "a", "aé", "aé", "aé", "aé", "aé😀", "aé😀!"]


def test_the_stop_token_is_in_the_ids_but_not_in_the_text(engine: Engine) -> None:
    ids = engine.generate([Request(prompt_ids=PROMPT, max_tokens=5)])[0].ids
    first = ids.index(ids[-1])
    stopping = Engine.over(wrap(build("llama")), LetterRenderer(stop=ids[-1]), context_length=CONTEXT)
    answer = stopping.generate([Request(prompt_ids=PROMPT, max_tokens=5)])[0]
    assert (answer.ids, answer.finish_reason) == (ids[: first + 1], "stop")
    assert answer.text == LETTERS.decode(ids[:first])
    assert len(stopping.generate([Request(prompt_ids=PROMPT, max_tokens=5, ignore_stop=True)])[0].ids) == 5


def test_an_answer_ends_with_the_context(engine: Engine) -> None:
    answer = engine.generate([Request(prompt_ids=[5] * (engine.context_length - 3), ignore_stop=True)])[0]
    assert (len(answer.ids), answer.finish_reason) == (3, "length")


def test_leaving_a_stream_frees_its_place(engine: Engine) -> None:
    for delta in engine.stream(Request(prompt_ids=PROMPT, max_tokens=50, ignore_stop=True)):
        assert delta.ids
        break
    assert engine._core.idle
