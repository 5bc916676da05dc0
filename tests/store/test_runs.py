"""Run folders: found by name or folder, whole or not at all, never overwritten unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.errors import InputError
from tunesmith.store import runs

RECIPE = "base: {model: some-base}\n"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def a_run(folder: Path) -> runs.Run:
    run = runs.create_run(folder, resume=False)
    runs.write_text(run.recipe, RECIPE)
    return run


def test_runs_at_home_and_elsewhere_are_listed_and_found(tmp_path: Path, own_home: Path) -> None:
    a_run(own_home / "runs" / "at-home")
    outside = a_run(tmp_path / "outside" / "abroad")
    assert {summary.name for summary in runs.list_runs()} == {"at-home", "abroad"}
    assert runs.find_run("abroad").folder == outside.folder
    assert runs.find_run(str(outside.folder)).folder == outside.folder
    with pytest.raises(InputError, match='no run "nobody"'):
        runs.find_run("nobody")


def test_the_database_can_be_lost(tmp_path: Path, own_home: Path) -> None:
    a_run(own_home / "runs" / "kept")
    a_run(tmp_path / "outside")
    (own_home / "tunesmith.db").unlink()
    assert [summary.name for summary in runs.list_runs()] == ["kept"]


def test_a_folder_that_holds_a_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        runs.create_run(tmp_path / "run", resume=False)
    assert runs.create_run(tmp_path / "run", resume=True).exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="names a folder"):
        runs.create_run(tmp_path / "run", resume=False)


def test_state_follows_the_files(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    assert runs.list_runs()[0].state == "started"
    with pytest.raises(InputError, match="no adapter yet"):
        run.tuned()
    run.adapter.mkdir()
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "held_out_loss": 1.0}\n{"step": 2, "lo')
    summary = runs.list_runs()[0]
    assert (summary.state, summary.steps, summary.base) == ("trained", 1, "some-base")
    runs.write_json(run.report, {"verdict": {"decision": "ship"}})
    assert runs.list_runs()[0].decision == "ship"


def test_remove_forgets_it(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    runs.remove_run(run)
    assert not run.folder.exists()
    assert runs.list_runs() == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    runs.write_json(path, {"a": 1})

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        runs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["facts.json"]


def test_a_run_that_is_not_trained_yet_is_not_taken_for_a_base(tmp_path: Path, own_home: Path) -> None:
    a_run(own_home / "runs" / "half")
    for name in ("half", str(own_home / "runs" / "half")):
        with pytest.raises(InputError, match="no adapter yet"):
            runs.locate(name)
    assert runs.locate("some-base") == runs.Located("some-base")
