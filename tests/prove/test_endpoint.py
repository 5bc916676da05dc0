"""A real HTTP endpoint that answers, falters and dies."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tunesmith.errors import InputError
from tunesmith.prove.answering import Prompt, ReplyCache
from tunesmith.prove.endpoint import Endpoint
from tunesmith.recipe import is_endpoint

PROMPTS = [Prompt(messages=({"role": "user", "content": f"q{i}"},)) for i in range(12)]


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        """`answer(number of the call, body)` gives (status, content)."""
        calls = []

        class Chat(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                calls.append((self.path, dict(self.headers), body))
                status, content = answer(len(calls), body)
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"big-model@http://127.0.0.1:{server.server_port}/v1", calls

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(text):
    return {
        "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2},
    }


def endpoint(name, **settings):
    return Endpoint(name, 16, first_wait=0.0, at_once=1, **settings)


def test_answers_come_back_in_order_with_their_tokens(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    name, calls = serve(lambda number, body: (200, completion(body["messages"][0]["content"].upper())))
    replies = Endpoint(name, 16).answer(PROMPTS)
    assert [reply.output for reply in replies] == [f"Q{i}" for i in range(12)]
    assert (replies[0].prompt_tokens, replies[0].output_tokens, replies[0].finish_reason) == (7, 2, "stop")
    path, headers, body = calls[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer k"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("big-model", 16, 0)


def test_a_busy_endpoint_is_asked_again(serve):
    name, calls = serve(lambda number, body: (429, {}) if number % 2 else (200, completion("ok")))
    assert [reply.output for reply in endpoint(name).answer(PROMPTS[:3])] == ["ok"] * 3
    assert len(calls) == 6


def test_one_that_dies_half_way_leaves_every_item_accounted_for(serve):
    name, calls = serve(lambda number, body: (200, completion("ok")) if number <= 4 else (500, {}))
    replies = endpoint(name, attempts=2).answer(PROMPTS)
    assert [reply.error is None for reply in replies] == [True] * 4 + [False] * 8
    assert "500" in (replies[4].error or "")
    assert "stopped answering" in (replies[-1].error or "")
    assert len(calls) == 4 + 5 * 2


@pytest.mark.parametrize("content", [b"not json", b'{"choices": []}', b"[]", b'{"choices": [{"message": 5}]}'])
def test_an_answer_that_is_no_completion_is_a_fault(serve, content):
    name, _ = serve(lambda number, body: (200, content))
    assert "not a chat completion" in (endpoint(name).answer(PROMPTS[:1])[0].error or "")


def test_a_lone_surrogate_can_be_stored(serve, tmp_path):
    name, _ = serve(lambda number, body: (200, completion("bad \ud800 half")))
    ReplyCache(tmp_path / "replies.jsonl").answer(endpoint(name), PROMPTS[:1])
    assert "bad ? half" in (tmp_path / "replies.jsonl").read_text()


def test_nobody_there_is_a_fault_not_a_crash():
    replies = endpoint("m@http://127.0.0.1:9/v1", attempts=1).answer(PROMPTS[:2])
    assert all("could not be reached" in (reply.error or "") for reply in replies)


def test_faults_are_not_remembered_and_answers_are(serve, tmp_path):
    name, calls = serve(lambda number, body: (200, completion("ok")) if number != 1 else (400, {}))
    cache = ReplyCache(tmp_path / "replies.jsonl")
    assert [reply.error is None for reply in cache.answer(endpoint(name), PROMPTS[:2])] == [False, True]
    again = ReplyCache(tmp_path / "replies.jsonl").answer(endpoint(name), PROMPTS[:2])
    assert all(reply.error is None for reply in again)
    assert len(calls) == 3


def test_offline_forbids_it(monkeypatch):
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    with pytest.raises(InputError, match="TUNESMITH_OFFLINE"):
        endpoint("m@http://127.0.0.1:9/v1").answer(PROMPTS[:1])


def test_names():
    assert is_endpoint("gpt@https://api.example.com/v1")
    assert not is_endpoint("tuned")
    assert not is_endpoint("runs/x@home")
