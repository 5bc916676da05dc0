"""A server with vLLM's shapes (its OpenAI-compatible server and LoRA documentation), answering by the own engine.

Written from the documentation: no vLLM runs in these tests.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Request
from tunesmith.errors import InputError

LORA_NOT_FOUND = "Loading lora x failed: No adapter found for "


class FakeVllm(ThreadingHTTPServer):
    """`seen` keeps the bodies of completions; `left` counts clients that went away."""

    daemon_threads = True

    def __init__(self, engine: Engine, *, token_ids: bool = True, wait: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.token_ids, self.wait = engine, token_ids, wait
        self.seen: list[dict[str, Any]] = []
        self.adapters: set[str] = set()
        self.left = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        longest = self.server.engine.context_length
        base = {"id": "base", "object": "model", "root": "base", "parent": None, "max_model_len": longest}
        adapters = [{"id": name, "object": "model", "parent": "base"} for name in sorted(self.server.adapters)]
        self._reply(200, {"object": "list", "data": [base, *adapters]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            self._load(body["lora_name"], Path(body["lora_path"]))
        elif self.path == "/v1/unload_lora_adapter":
            self.server.adapters.remove(body["lora_name"])
            self.server.engine.remove_adapter(body["lora_name"])
            self._reply(200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")
        elif body["model"] not in {"base", *self.server.adapters}:
            self._refuse(404, f"The model `{body['model']}` does not exist.")
        elif "prompt_logprobs" in body:
            self._score(body)
        else:
            self._complete(body)

    def _load(self, name: str, path: Path) -> None:
        try:
            self.server.engine.add_adapter(name, path)
        except InputError:
            return self._refuse(404, LORA_NOT_FOUND + str(path))
        self.server.adapters.add(name)
        return self._reply(200, f"Success: LoRA adapter '{name}' added successfully.")

    def _score(self, body: dict[str, Any]) -> None:
        ids = body["prompt"]
        scores = self.server.engine.logprobs(ids[:1], ids[1:], adapter=self._adapter(body))
        entries = [{str(token): {"logprob": score, "rank": 1}} for token, score in zip(ids[1:], scores, strict=True)]
        self._reply(200, {"choices": [{"index": 0, "text": "", "prompt_logprobs": [None, *entries]}]})

    def _complete(self, body: dict[str, Any]) -> None:
        self.server.seen.append(body)
        asked = Request(
            prompt_ids=body["prompt"],
            adapter=self._adapter(body),
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            n=body["n"],
            seed=body["seed"],
            stop=body["stop"],
            logprobs=body.get("logprobs") or ("logprobs" in body),
            ignore_stop=body["ignore_eos"],
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for delta in self.server.engine.stream(asked):
                time.sleep(self.server.wait)
                self._event(self._choice(delta, body))
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.left += 1

    def _choice(self, delta: Any, body: dict[str, Any]) -> dict[str, Any]:
        reason = None if delta.answer is None else delta.answer.finish_reason
        choice = {"index": delta.index, "text": delta.text, "logprobs": None, "finish_reason": reason}
        if self.server.token_ids:
            choice["token_ids"] = delta.ids
        if "logprobs" in body and delta.answer is not None:  # vLLM spreads them over the pieces; all at the end here
            top = delta.answer.top_logprobs or [[] for _ in delta.answer.ids]
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}" for token in delta.answer.ids],
                "token_logprobs": delta.answer.logprobs,
                "top_logprobs": [{f"token_id:{token}": number for token, number in place} for place in top],
            }
        return {"object": "text_completion", "choices": [choice]}

    def _adapter(self, body: dict[str, Any]) -> str | None:
        return None if body["model"] == "base" else body["model"]

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, status: int, message: str) -> None:
        self._reply(status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})

    def _reply(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
