"""Trainings that are killed, stopped, or lose their disk, as processes of their own; `make chaos` kills fifty."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from chaos_commands import HANGS, run, start
from kills import assert_same, kill_and_resume, until

from small_jobs import STEPS, make_job
from tunesmith import train
from tunesmith.errors import TunesmithError
from tunesmith.recipe import Recipe
from tunesmith.store.runs import read_json
from tunesmith.train.checkpoint import list_checkpoints, load_checkpoint


def learns(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() and '"loss"' in (folder / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def recipe(place: Path) -> Path:
    return make_job(place / "job")


@pytest.fixture(scope="module")
def whole(place: Path, recipe: Path) -> Path:
    """A training that nobody disturbed."""
    status, said = run("train", recipe, "--run", place / "whole", home=place / "home")
    assert status == 0, said
    return place / "whole"


def test_a_run_leaves_nothing_outside_its_folder_and_the_home(place: Path, whole: Path) -> None:
    assert {path.name for path in place.iterdir()} == {"job", "home", "whole"}
    assert {path.name for path in (place / "home").iterdir()} == {
        "stderr",
        "scratch",
        "tunesmith",
    }  # the harness's own two
    assert not list((place / "home" / "scratch").iterdir())  # TMPDIR


def test_killed_trainings_end_as_if_nothing_had_happened(tmp_path: Path, recipe: Path, whole: Path) -> None:
    kinds = ["writing", "training", "publishing"]
    assert kill_and_resume(recipe, tmp_path / "run", whole, kinds, random.Random(0)) > 0


def test_a_signal_and_a_full_disk_keep_the_last_checkpoint(tmp_path: Path, recipe: Path, whole: Path) -> None:
    """SIGTERM, then a disk that takes no more; and in the end the same bytes."""
    folder, home = tmp_path / "a run", tmp_path / "home"
    command = start("train", recipe, "--run", folder, home=home)
    until(command, lambda: learns(folder))
    command.signal(signal.SIGTERM)
    assert command.wait() == 130
    assert f"of {STEPS}, saved; continue with:\n  tunesmith train '{folder}/recipe.yaml'" in command.stderr
    newest = list_checkpoints(folder / "checkpoints")[0]

    status, said = run("train", recipe, "--run", folder, "--resume", home=home, largest_file=30_000)
    assert status == 1
    assert f"file too large, so training stopped; the checkpoint {newest.name} is kept; make room" in said
    assert "Traceback" not in said
    assert load_checkpoint(newest) is not None

    status, said = run("train", recipe, "--run", folder, "--resume", home=home)
    assert status == 0, said
    assert_same(folder, whole)
    assert "resumed" not in read_json(folder / "lineage.json")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once_and_keeps_the_last_checkpoint(
    tmp_path: Path, recipe: Path, whole: Path, number: int
) -> None:
    """In the middle of step 6 of 20, which never ends: one signal is not enough, two are, and step 4 is left."""
    folder, home = tmp_path / "run", tmp_path / "home"
    command = start("train", recipe, "--run", folder, home=home, endless_step=6)
    until(command, lambda: HANGS in command.stderr)
    command.signal(number)
    until(command, lambda: "a second signal stops at once" in command.stderr)
    command.process.join(0.5)
    assert command.running  # the step is not done, so the first signal waits
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    command.signal(number)
    command.process.join(10)
    assert command.process.exitcode == 130
    assert command.stderr.splitlines()[-2:] == [
        "stopped at once; the checkpoint step-4 is kept; continue with:",
        f"  tunesmith train {folder}/recipe.yaml --run {folder} --resume",
    ]
    assert "Traceback" not in command.stderr
    assert before == {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    assert load_checkpoint(folder / "checkpoints" / "step-4") is not None

    status, said = run("train", recipe, "--run", folder, "--resume", home=home)
    assert status == 0, said
    assert "resumed after step 4" in said
    assert_same(folder, whole)


def test_a_folder_that_is_taken_away_is_not_made_again(tmp_path: Path, recipe: Path) -> None:
    folder = tmp_path / "run"
    command = start("train", recipe, "--run", folder, home=tmp_path / "home")
    until(command, lambda: learns(folder))
    folder.rename(tmp_path / "unplugged")
    assert command.wait() == 1
    assert command.stderr.splitlines()[-1] == f"tunesmith: {folder}: the run folder is gone, so training stopped"
    assert not folder.exists()


def test_losses_that_are_not_numbers_stop_the_run_and_name_the_rows(tmp_path: Path) -> None:
    recipe = Recipe.load(make_job(tmp_path / "job", lr=1e30, eval_every=0))
    with pytest.raises(
        TunesmithError, match=r"3 steps in a row had .* the last on .*rows.jsonl line \d+, .*rows.jsonl"
    ):
        train(recipe, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in text.split("\n")[:-1]
    ]
    assert [row["skipped"] for row in rows[-3:]] == [True] * 3
    shutil.rmtree(tmp_path / "run")
