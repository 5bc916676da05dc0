"""An OpenAI-compatible endpoint as a contender or a judge: "MODEL@URL", its key in $OPENAI_API_KEY."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tunesmith.errors import InputError
from tunesmith.home import offline
from tunesmith.prove.answering import Progress, Prompt, Reply, failed
from tunesmith.prove.task import canonical

RETRIED_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})
FAILURES_UNTIL_DEAD = 5  # in a row; the rest is then not asked, and counted as unanswered


@dataclass(slots=True)
class Endpoint:
    """A hosted model at temperature 0. A call that fails for good gives a reply with its error."""

    name: str  # MODEL@URL
    max_tokens: int
    attempts: int = 4
    timeout: float = 120.0
    at_once: int = 4
    first_wait: float = 1.0  # seconds before the second attempt; doubles
    _failures: int = field(default=0, init=False)

    @property
    def dead(self) -> bool:
        """It failed so often in a row that it is asked no more."""
        return self._failures >= FAILURES_UNTIL_DEAD

    def fingerprint(self, prompt: Prompt) -> str | None:
        """The model, where it lives, and all it is asked."""
        return "endpoint " + canonical([self.name, _messages(prompt), list(prompt.tools), self.max_tokens])

    def implied(self, prompt: Prompt, known: Mapping[str, Reply]) -> Reply | None:
        """Never: what a server does with a prompt is its own affair."""
        return None

    def answer(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Reply]:
        """One reply a prompt, a few at a time. Raises InputError where TUNESMITH_OFFLINE forbids asking."""
        if offline():
            raise InputError(
                f'contender "{self.name}" needs the network, which TUNESMITH_OFFLINE forbids; take it out or unset that'
            )
        with ThreadPoolExecutor(self.at_once) as pool:
            replies: list[Reply] = []
            for reply in pool.map(self._answer, prompts):
                replies.append(reply)
                if progress is not None:
                    progress(len(replies), len(prompts))
            return replies

    def _answer(self, prompt: Prompt) -> Reply:
        if self.dead:
            return failed("not asked: the endpoint had stopped answering")
        began = time.perf_counter()
        try:
            body = self._post(prompt)
            choice, usage = body["choices"][0], body.get("usage") or {}
            text = choice["message"].get("content") or ""
            reply = Reply(
                output=text.encode("utf-8", "replace").decode("utf-8"),
                finish_reason=str(choice.get("finish_reason") or "stop"),
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                output_tokens=int(usage.get("completion_tokens") or 0),
                seconds=time.perf_counter() - began,
            )
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError, AttributeError) as why:
            self._failures += 1
            return failed(_reason(why))
        self._failures = 0
        return reply

    def _post(self, prompt: Prompt) -> dict[str, Any]:
        """The response's body, after retries. Raises what urllib and json raise."""
        model, _, rest = self.name.partition("@http")
        url = "http" + rest
        asked: dict[str, Any] = {"model": model, "messages": _messages(prompt), "temperature": 0}
        asked["max_tokens"] = self.max_tokens
        if prompt.tools:
            asked["tools"] = list(prompt.tools)
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '-')}",
        }
        for attempt in range(self.attempts):
            request = urllib.request.Request(
                url.rstrip("/") + "/chat/completions", json.dumps(asked).encode(), headers, method="POST"
            )
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED_STATUS or attempt + 1 == self.attempts:
                    raise
            except (OSError, http.client.HTTPException):
                if attempt + 1 == self.attempts:
                    raise
            time.sleep(self.first_wait * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    if prompt.text is not None:
        return [{"role": "user", "content": prompt.text}]
    return [{key: value for key, value in message.items() if key != "weight"} for message in prompt.messages]


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the endpoint answered {error.code} {error.reason}"
    if isinstance(error, OSError | http.client.HTTPException):
        return f"the endpoint could not be reached ({error})"
    return "the endpoint's answer is not a chat completion"
