"""The command line: one sentence and the right exit status for every kind of bad input, JSON where asked."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith import cli

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: (exit status, stdout, stderr)."""
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tunesmith", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def recipe(folder: Path, rows: str | bytes, **keys: object) -> Path:
    data = folder / "rows.jsonl"
    data.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    path = folder / "job.yaml"
    path.write_text(json.dumps({"data": {"train": "rows.jsonl"}, **keys}))
    return path


GOOD = "".join(json.dumps({"input": f"question number {i}", "output": f"answer {i}"}) + "\n" for i in range(20))


def one_sentence(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("tunesmith: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "the file is empty"),
        ('{"input": "a", "output": "b"}\n{"input": "a", oops}\n', "rows.jsonl line 2"),
        (b'{"input": "a", "output": "b"}\n{"input": "caf\xe9", "output": "b"}\n', "rows.jsonl line 2"),
        ('{"input": "a"}\n', "rows.jsonl line 1"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "rows.jsonl line 1"),
        ('{"input": "a", "output": "b"}\n{"text": "c"}\n', "rows.jsonl line 2"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "preference"),
    ],
)
def test_bad_rows_are_named(command: Command, tmp_path: Path, rows: str | bytes, said: str) -> None:
    status, _, err = command("train", recipe(tmp_path, rows), "--run", tmp_path / "run")
    assert status == 2
    assert said in one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_missing_files_are_named(command: Command, tmp_path: Path) -> None:
    status, _, err = command("train", tmp_path / "none.yaml")
    assert (status, "none.yaml" in one_sentence(err)) == (2, True)
    path = recipe(tmp_path, GOOD)
    (tmp_path / "rows.jsonl").unlink()
    status, _, err = command("run", path)
    assert (status, "rows.jsonl" in one_sentence(err)) == (2, True)


def test_an_unknown_base_is_named_with_the_nearest(command: Command, tmp_path: Path) -> None:
    path = recipe(tmp_path, GOOD, base="smollm2-135m-instrukt")
    status, _, err = command("train", path, "--run", tmp_path / "run")
    assert status == 2
    assert 'did you mean "smollm2-135m-instruct"' in one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_offline_says_so_and_leaves_nothing(command: Command, tmp_path: Path) -> None:
    status, _, err = command("train", recipe(tmp_path, GOOD), "--run", tmp_path / "run")
    assert status == 2
    assert "TUNESMITH_OFFLINE" in one_sentence(err)
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_folder_that_holds_a_run_is_refused_before_any_work(command: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("base: {model: x}\n")
    status, _, err = command("train", recipe(tmp_path, GOOD), "--run", tmp_path / "run")
    assert status == 2
    assert "--resume" in one_sentence(err)


def test_usage_errors_exit_2(command: Command) -> None:
    assert command("nonsense")[0] == 2
    assert command("train")[0] == 2


def test_runs_list_is_fast_and_prints_json(command: Command, tmp_path: Path) -> None:
    status, out, _ = command("runs", "list", "--json")
    assert (status, json.loads(out)) == (0, [])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "tunesmith.cli", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # of the processor
    assert seconds < 1.0  # 0.35 measured; importing torch takes more than 2


def test_unknown_runs_and_models_are_told(command: Command) -> None:
    assert 'no run "nobody"' in one_sentence(command("runs", "show", "nobody")[2])
    assert command("prove", "nobody")[0] == 2
    assert command("models", "rm", "nothing")[0] == 2
    assert command("chat", "nothing", "hello")[0] == 2


def test_where_nothing_is_held_out_the_run_is_what_is_printed(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith import pipeline
    from tunesmith.store.runs import Run

    (tmp_path / "done" / "adapter").mkdir(parents=True)
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: Run(tmp_path / "done"))
    path = recipe(tmp_path, GOOD, data={"train": "rows.jsonl", "held_out": 0})
    status, out, _ = command("run", path, "--json")
    assert status == 0
    assert json.loads(out) == {"run": str(tmp_path / "done"), "adapter": str(tmp_path / "done" / "adapter")}


def test_a_contender_that_there_is_not_is_said_before_the_training(command: Command, tmp_path: Path) -> None:
    status, out, err = command("run", recipe(tmp_path, GOOD, prove={"contenders": ["tuned", "last-week"]}))
    assert (status, out) == (2, "")
    assert '"last-week" is no contender, run or adapter' in one_sentence(err)


def test_a_reader_that_goes_away_ends_a_command_quietly_and_a_peer_that_does_is_an_error_like_any_other(
    command: Command,
) -> None:
    """A server that hangs up must not kill the command without a word, as SIGPIPE would where it is not ignored."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "tunesmith.cli", "--help"]
    with os.fdopen(write, "wb") as gone:
        done = subprocess.run(words, stdout=gone, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    assert command("--help")[0] == 0
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
