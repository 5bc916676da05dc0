"""What a resumed run keeps to, and what it says where it can't: the layout decides in which order sums are rounded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from small_jobs import make_job
from stopped import stopped_after
from tunesmith import fitting, train, trainable
from tunesmith.errors import InputError, InterruptedRun
from tunesmith.progress import Reporter
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, alone, read_json
from tunesmith.train import estimate

WEIGHTS = "adapter_model.safetensors"


class Listener(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def one_thread_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = make_job(tmp_path_factory.mktemp("lineage"), max_steps=6, eval_every=0)
    return Recipe.load(path, ["runtime.threads=2"])


@pytest.fixture(scope="module")
def half(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A run that was stopped after three of its six steps, and the bytes it should end with."""
    place = tmp_path_factory.mktemp("runs")
    whole = (train(recipe, place / "whole").adapter / WEIGHTS).read_bytes()

    with stopped_after(3), pytest.raises(InterruptedRun):
        train(recipe, place / "half")
    return place / "half", whole


def resume(half: Path, place: Path, recipe: Recipe) -> tuple[Run, list[str]]:
    shutil.copytree(half, place / "run")
    listener = Listener()
    return train(recipe, place / "run", resume=True, reporter=listener), listener.said


def test_the_lineage_says_what_must_match(half: tuple[Path, bytes]) -> None:
    lineage = read_json(Run(half[0]).lineage)
    assert lineage["layout"]["lanes"] == lineage["threads"] == 2
    assert set(lineage["must_match"]["for_the_same_bytes"]) <= lineage.keys()
    assert {"layout", "threads", "packages", "data_hash", "base_weights_hash"} <= set(
        lineage["must_match"]["for_the_same_bytes"]
    )


def test_less_free_memory_and_other_threads_do_not_change_a_resumed_run(
    half: tuple[Path, bytes], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(trainable, "choose_layout", lambda *_, **__: pytest.fail("chosen anew"))
    auto = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"threads": "auto"})})
    done, said = resume(half[0], tmp_path, auto)
    assert torch.get_num_threads() == 2
    assert (done.adapter / WEIGHTS).read_bytes() == half[1]
    assert not [sentence for sentence in said if "rounding" in sentence]
    assert "resumed" not in read_json(done.lineage)


def test_where_the_layout_no_longer_fits_it_is_said_and_noted(
    half: tuple[Path, bytes], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainable, "fits_again", lambda *_: False)
    budget = estimate.LARGEST_BUDGET
    monkeypatch.setattr(estimate, "LARGEST_BUDGET", 300)
    done, said = resume(half[0], tmp_path, recipe)
    (sentence,) = [each for each in said if "rounding" in each]
    assert f"layout (token_budget {budget} -> 300" in sentence
    (note,) = read_json(done.lineage)["resumed"]
    assert note["after_step"] == 3
    assert note["changed"].keys() == {"layout"}
    assert read_json(done.lineage)["layout"] == read_json(Run(half[0]).lineage)["layout"]  # how it was started


def test_a_layout_fits_again_only_under_what_it_takes(half: tuple[Path, bytes], recipe: Recipe) -> None:
    from tunesmith.lineage import started
    from tunesmith.preparation import prepare, read_and_split

    before = started(Run(half[0]), recipe)
    assert before is not None
    ready = prepare(recipe, read_and_split(recipe, lambda _: None), Reporter())
    made = trainable.make_trainable(ready, Reporter(), before)
    assert made.layout == before.layout
    steps = trainable.step_plan(ready, before.layout, ready.train.examples)
    need = fitting.plan_run(ready, made).estimate.peak_bytes
    assert estimate.fits_again(made.body, made.parameters, steps, 2 * need)
    assert not estimate.fits_again(made.body, made.parameters, steps, need // 2)


def test_workers_keep_a_layout_only_if_all_of_them_can(
    half: tuple[Path, bytes], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker says what this one hears: in two layouts their passes would not be each other's."""
    from tunesmith.lineage import started
    from tunesmith.preparation import prepare, read_and_split

    before = started(Run(half[0]), recipe)
    assert before is not None
    monkeypatch.setattr(estimate, "LARGEST_BUDGET", 300)  # what is chosen anew is another layout
    for other_can in (True, False):
        ready = prepare(recipe, read_and_split(recipe, lambda _: None), Reporter())
        monkeypatch.setattr(trainable.parallel, "gather", lambda value, other=other_can: [value, other])
        assert (trainable.make_trainable(ready, Reporter(), before).layout == before.layout) is other_can


def test_another_recipe_is_refused_before_any_work(half: tuple[Path, bytes], recipe: Recipe, tmp_path: Path) -> None:
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})})
    shutil.copytree(half[0], tmp_path / "run")
    with pytest.raises(InputError, match="the recipe changed since this run was started"):
        train(other, tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "lineage.json").read_text())["seed"] == 0


def test_two_trainings_never_share_a_folder(half: tuple[Path, bytes], recipe: Recipe) -> None:
    with alone(Run(half[0])), pytest.raises(InputError, match="another process is training"):
        train(recipe, half[0], resume=True)
