"""What a stopped command prints to go on with: entered as it stands, it does all that was asked for."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

import tunesmith
from small_jobs import make_questions
from stopped import stopped_after
from tunesmith import cli
from tunesmith.errors import InterruptedRun
from tunesmith.prove.answering import EngineModel
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_metrics


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    train = {"max_steps": 4, "batch_examples": 5, "lr": 1e-2, "eval_every": 0}
    return Recipe.load(make_questions(tmp_path, base={"max_position_embeddings": 512}, train=train))


def go_on(said: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Enter the command on the last line; returns it."""
    line = said.splitlines()[-1].strip()
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return line


def test_a_stopped_run_goes_on_to_its_proof(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = Run(tmp_path / "a run")
    with stopped_after(2), pytest.raises(InterruptedRun, match="stopped after step 2 of 4") as stopped:
        tunesmith.run(recipe, done.folder)
    assert go_on(str(stopped.value), monkeypatch).startswith("tunesmith run ")
    assert [row["step"] for row in read_metrics(done) if "loss" in row] == [1, 2, 3, 4]
    assert done.report.exists()


def test_a_stopped_training_goes_on_to_its_adapter(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopped_after(2), pytest.raises(InterruptedRun) as stopped:
        tunesmith.train(recipe, tmp_path / "run")
    assert go_on(str(stopped.value), monkeypatch).startswith("tunesmith train ")
    assert Run(tmp_path / "run").adapter.exists()
    assert not Run(tmp_path / "run").report.exists()


def test_a_stopped_proof_goes_on_where_it_was(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal while the last contender answers: what was said before is not asked again."""
    done, asked, answer, signals = Run(tmp_path / "run"), [], EngineModel.answer, [2]
    items = 4

    def stopped_at_the_second_contender(self: EngineModel, prompts, *rest):
        asked.append(len(prompts))
        if asked.count(items) in signals:
            raise KeyboardInterrupt
        return answer(self, prompts, *rest)

    monkeypatch.setattr(EngineModel, "answer", stopped_at_the_second_contender)
    with pytest.raises(InterruptedRun, match="stopped while proving") as stopped:
        tunesmith.run(recipe, done.folder)
    assert not done.report.exists()
    signals.clear()
    asked.clear()
    assert go_on(str(stopped.value), monkeypatch) == f"tunesmith prove {done.folder}"
    assert asked == [items]  # the second contender's: neither the first's nor what wordings were chosen by
    assert done.report.exists()


def test_a_stopped_proof_goes_on_with_what_it_was_told(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunesmith.train(recipe, tmp_path / "run")
    monkeypatch.setattr(EngineModel, "answer", lambda *asked: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(InterruptedRun) as stopped:
        tunesmith.prove(tmp_path / "run", overrides=["prove.contenders=[prompt, tuned]", "prove.few_shot=1"])
    command = shlex.split(str(stopped.value).rpartition("\n")[2])
    assert command == [
        *("tunesmith", "prove", str(tmp_path / "run")),
        *("--set", "prove.contenders=[prompt, tuned]", "--set", "prove.few_shot=1"),
    ]
