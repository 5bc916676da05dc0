"""`tunesmith chat` as a person meets it: in a real terminal, with adapters to switch between."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tiny_llama import save
from tunesmith import conversation
from tunesmith.models.loading import load_base
from tunesmith.models.lora import add_new_adapter, wrap
from tunesmith.models.peft_format import save_adapter
from tunesmith.recipe import Adapter as Section


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with two adapters on it, and one on another base."""
    home = tmp_path_factory.mktemp("chat")
    for seed, (name, base) in enumerate((("one", "base"), ("two", "base"), ("stranger", "other"))):
        folder = save(home / base, max_position_embeddings=512, initializer_range=0.2)
        lora = wrap(load_base(str(folder)).model)
        add_new_adapter(lora, "x", Section(rank=4, alpha=8), seed)
        for _, weights in lora.parameters("x"):
            weights.data.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
        save_adapter(lora, "x", home / name, Section(rank=4, alpha=8), str(folder))
    return home


class Terminal:
    """`tunesmith chat` on a terminal of its own."""

    def __init__(self, home: Path, *words: str) -> None:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "tunesmith.cli", "chat", *words]
        own = {**os.environ, "TUNESMITH_HOME": str(home), "COLUMNS": "200"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=own, cwd=home)
        os.close(theirs)
        self._file = ours
        self.until("\n> ")

    def say(self, line: str) -> str:
        """Type a line; what is shown up to the next question."""
        os.write(self._file, f"{line}\n".encode())
        return self.until("\n> ").partition("\n")[2].removesuffix("\n> ")

    def until(self, end: str) -> str:
        seen, limit = "", time.monotonic() + 120
        while not seen.endswith(end):
            assert time.monotonic() < limit, seen
            if select.select([self._file], [], [], 1.0)[0]:
                seen += os.read(self._file, 4096).decode(errors="replace").replace("\r\n", "\n")
        return seen

    def leave(self) -> int:
        os.write(self._file, b"\x04")
        return self.process.wait(60)


def test_a_terminal_switches_adapters_and_shows_the_base_beside(home: Path) -> None:
    terminal = Terminal(home, "one", "--max-tokens", "6")
    first = terminal.say("hello")
    assert first
    assert terminal.say("/new") == "started over"
    assert terminal.say("hello") == first
    assert terminal.say("/adapter two") == "answered by two"
    terminal.say("/new")
    second = terminal.say("hello")
    assert second != first
    assert terminal.say("/adapter") == "answered by two; known here: one, two, none"
    terminal.say("/adapter none")
    terminal.say("/new")
    bare = terminal.say("hello")
    assert bare not in (first, second)
    terminal.say("/adapter one")
    terminal.say("/new")
    assert terminal.say("/base") == "the base is asked too"
    assert terminal.say("hello") == f"none: {bare}\none:  {first}"
    terminal.say("/base")
    assert terminal.say("/system Be kind.") == "system prompt: Be kind."
    assert terminal.say("hello") != first
    assert "is no adapter and no run with one; known here: one, two, none" in terminal.say("/adapter nobody")
    assert "stands on" in terminal.say("/adapter stranger")
    assert "/adapter NAME" in terminal.say("/nonsense")
    assert "tokens" in terminal.say("x" * 600), "a question that is too long ends the conversation"
    assert terminal.say("hello")
    assert terminal.leave() == 0


def test_the_base_beside_one_question_as_json(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tunesmith import cli

    monkeypatch.chdir(home)
    words = ["tunesmith", "chat", "one", "hello", "--max-tokens", "6", "--beside-base", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    facts = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert facts["answer"] != facts["base"]["answer"]
    assert facts["base"].keys() == {"answer", "finish_reason", "prompt_tokens", "output_tokens"}


def test_an_answer_cut_short_leaves_no_half_turn_behind(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    talk = conversation.open_conversation("one", system="Be kind.", temperature=0.0, max_tokens=6)
    for _ in talk.ask("hello"):
        break
    assert talk.turns == []
    assert talk.engine._core.idle
    text = "".join(talk.ask("hello"))
    assert talk.turns == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
