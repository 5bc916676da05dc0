"""Fixtures shared by all tests: the real pretrained base, converted once per machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chat_endpoint import Answering, ChatEndpoint

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests' own home, so that they never touch a person's.
os.environ.setdefault("TUNESMITH_HOME", str(Path(__file__).resolve().parents[1] / ".cache" / "home"))
HOME = os.environ["TUNESMITH_HOME"]


@pytest.fixture(scope="session")
def base() -> Path:
    """The embedded base as a converted folder (fetched and converted on first use)."""
    from tunesmith.models.catalogue import resolve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", HOME)  # also where the first test to ask for it has a home of its own
        return resolve("smollm2-135m-instruct").folder


@pytest.fixture
def serve() -> Iterator[Callable[[Answering], ChatEndpoint]]:
    """`serve(answer)` starts a chat endpoint, which ends with the test."""
    servers: list[ChatEndpoint] = []

    def start(answer: Answering) -> ChatEndpoint:
        servers.append(ChatEndpoint(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
