"""A real HTTP endpoint of the OpenAI chat shape; a function answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (number of the call, from 1; its body) -> status, and the answer's text, or the whole body as JSON or as bytes
Answering = Callable[[int, dict[str, Any]], tuple[int, Any]]


class ChatEndpoint(ThreadingHTTPServer):
    """`calls` keeps what it was sent: path, headers, body. `name` is what a recipe calls it."""

    daemon_threads = True

    def __init__(self, answer: Answering) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.calls = answer, list[tuple[str, dict[str, str], dict[str, Any]]]()
        self.name = f"big-model@http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def asked(self) -> list[str]:
        """The last turn of each call."""
        return [last_turn(body) for _, _, body in self.calls]


class _Handler(BaseHTTPRequestHandler):
    server: ChatEndpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path, dict(self.headers), body))
        status, content = self.server.answer(len(self.server.calls), body)
        if isinstance(content, str):
            content = completion(content)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


def completion(text: str) -> dict[str, Any]:
    return {
        "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2},
    }


def last_turn(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]
