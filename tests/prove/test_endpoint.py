"""A real HTTP endpoint that answers, falters and dies."""

from __future__ import annotations

import pytest

from chat_endpoint import last_turn
from tunesmith.errors import InputError
from tunesmith.prove.answering import Prompt, ReplyCache
from tunesmith.prove.endpoint import Endpoint
from tunesmith.recipe import is_endpoint

PROMPTS = [Prompt(messages=({"role": "user", "content": f"q{i}"},)) for i in range(12)]


def endpoint(name, **settings):
    return Endpoint(name, 16, first_wait=0.0, at_once=1, **settings)


def test_answers_come_back_in_order_with_their_tokens(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    server = serve(lambda number, body: (200, last_turn(body).upper()))
    replies = Endpoint(server.name, 16).answer(PROMPTS)
    assert [reply.output for reply in replies] == [f"Q{i}" for i in range(12)]
    assert (replies[0].prompt_tokens, replies[0].output_tokens, replies[0].finish_reason) == (7, 2, "stop")
    path, headers, body = server.calls[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer k"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("big-model", 16, 0)


def test_a_busy_endpoint_is_asked_again(serve):
    server = serve(lambda number, body: (429, {}) if number % 2 else (200, "ok"))
    assert [reply.output for reply in endpoint(server.name).answer(PROMPTS[:3])] == ["ok"] * 3
    assert len(server.calls) == 6


def test_one_that_dies_half_way_leaves_every_item_accounted_for(serve):
    server = serve(lambda number, body: (200, "ok") if number <= 4 else (500, {}))
    replies = endpoint(server.name, attempts=2).answer(PROMPTS)
    assert [reply.error is None for reply in replies] == [True] * 4 + [False] * 8
    assert "500" in (replies[4].error or "")
    assert "stopped answering" in (replies[-1].error or "")
    assert len(server.calls) == 4 + 5 * 2


@pytest.mark.parametrize("content", [b"not json", b'{"choices": []}', b"[]", b'{"choices": [{"message": 5}]}'])
def test_an_answer_that_is_no_completion_is_a_fault(serve, content):
    server = serve(lambda number, body: (200, content))
    assert "not a chat completion" in (endpoint(server.name).answer(PROMPTS[:1])[0].error or "")


def test_a_lone_surrogate_can_be_stored(serve, tmp_path):
    server = serve(lambda number, body: (200, "bad \ud800 half"))
    ReplyCache(tmp_path / "replies.jsonl").answer(endpoint(server.name), PROMPTS[:1])
    assert "bad ? half" in (tmp_path / "replies.jsonl").read_text()


def test_nobody_there_is_a_fault_not_a_crash():
    replies = endpoint("m@http://127.0.0.1:9/v1", attempts=1).answer(PROMPTS[:2])
    assert all("could not be reached" in (reply.error or "") for reply in replies)


def test_faults_are_not_remembered_and_answers_are(serve, tmp_path):
    server = serve(lambda number, body: (200, "ok") if number != 1 else (400, {}))
    cache = ReplyCache(tmp_path / "replies.jsonl")
    assert [reply.error is None for reply in cache.answer(endpoint(server.name), PROMPTS[:2])] == [False, True]
    again = ReplyCache(tmp_path / "replies.jsonl").answer(endpoint(server.name), PROMPTS[:2])
    assert all(reply.error is None for reply in again)
    assert len(server.calls) == 3


def test_offline_forbids_it(monkeypatch):
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    with pytest.raises(InputError, match="TUNESMITH_OFFLINE"):
        endpoint("m@http://127.0.0.1:9/v1").answer(PROMPTS[:1])


def test_names():
    assert is_endpoint("gpt@https://api.example.com/v1")
    assert not is_endpoint("tuned")
    assert not is_endpoint("runs/x@home")
