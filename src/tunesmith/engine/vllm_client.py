"""vLLM's HTTP, as far as the engine over it needs: completions, streamed or not, models, adapters."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any

from tunesmith.engine.request import BusyError
from tunesmith.errors import InputError, TunesmithError
from tunesmith.home import offline

FULL = frozenset({429, 503})  # statuses of a server that will answer later


class VllmClient:
    """Talks to one server; its key, where it wants one, is in $VLLM_API_KEY. Safe to share between threads."""

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        """`timeout`: seconds without a word from the server."""
        if not url.startswith(("http://", "https://")):
            raise InputError(f'"{url}" is no address of a vLLM server; it looks like http://host:8000')
        if offline():
            raise InputError(f"the vLLM server at {url} needs the network, which TUNESMITH_OFFLINE forbids")
        self._url, self._timeout = url.rstrip("/").removesuffix("/v1"), timeout

    def models(self) -> list[dict[str, Any]]:
        """What it serves: bases, and adapters, which have a parent."""
        return self._json("GET", "/v1/models", None)["data"]

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._json("POST", "/v1/completions", body)

    def stream(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Server-sent events, each a part of a completion."""
        try:
            with self._open("POST", "/v1/completions", body) as response:
                for line in response:
                    data = line.decode().strip().removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    if data:
                        event = json.loads(data)
                        if "error" in event:
                            raise TunesmithError(f"the server at {self._url} failed: {_said(event)}")
                        yield event
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TunesmithError(f"the server at {self._url} broke off ({error})") from None

    def load_adapter(self, name: str, path: str) -> None:
        """Raises InputError where the server won't, with what it says."""
        try:
            self._open("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}).close()
        except InputError as error:
            raise InputError(
                f"{error}; start vLLM with --enable-lora --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, "
                f"and see that {path} is there on its machine"
            ) from None

    def unload_adapter(self, name: str) -> None:
        self._open("POST", "/v1/unload_lora_adapter", {"lora_name": name}).close()

    def _json(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        with self._open(method, path, body) as response:
            try:
                return json.load(response)
            except ValueError:
                raise InputError(f"what answers at {self._url}{path} is no vLLM server") from None

    def _open(self, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '-')}"}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            with error:
                said = _said(error.read())
            if error.code in FULL:
                raise BusyError(f"the server at {self._url} is busy; ask again later ({said})") from None
            if error.code >= 500:
                raise TunesmithError(f"the server at {self._url} failed: {said}") from None
            raise InputError(f"the server at {self._url} refused {path}: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"no vLLM server answers at {self._url} ({reason}); start it, or leave it out") from None


def _said(body: bytes | dict[str, Any]) -> str:
    """The message of an error as vLLM writes it: {"error": {"message": ..}}, or the message at the top (older)."""
    try:
        found = body if isinstance(body, dict) else json.loads(body)
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return body.decode(errors="replace")[:200] if isinstance(body, bytes) else str(body)
