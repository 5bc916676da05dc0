"""The recipe: strict keys, exact places in errors, a hash that means what it says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunesmith.data.schema import load_schema
from tunesmith.errors import InputError
from tunesmith.recipe import Recipe


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_defaults_need_only_the_data(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, "data: {train: rows.jsonl}"))
    assert recipe.name == "job"
    assert recipe.base.model == "smollm2-135m-instruct"
    assert recipe.data.train == str(tmp_path.resolve() / "rows.jsonl")
    assert recipe.adapter is not None
    assert recipe.adapter.rank == 16


def test_base_as_one_word_and_full_fine_tuning(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, "base: gpt2\nadapter: null\ndata: {train: a.jsonl}"))
    assert recipe.base.model == "gpt2"
    assert recipe.adapter is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {train: a}\ntrain:\n  epochz: 2",
            'job.yaml line 3: unknown key "train.epochz"; did you mean "epochs"?',
        ),
        ("data:\n  train: a\n  schem: b", 'job.yaml line 3: unknown key "data.schem"; did you mean "schema"?'),
        ("dataa: {train: a}", 'job.yaml line 1: unknown key "dataa"; did you mean "data"?'),
        ("data: {train: a}\nadapter:\n  rank: none", 'job.yaml line 3: "adapter.rank"'),
        ("data: {train: a}\nadapter:\n  rank: 0", 'job.yaml line 3: "adapter.rank"'),
        ("data: {held_out: 0.1}", 'job.yaml line 1: the key "data.train" is required'),
        ("data: {train: a}\ndata: {train: b}", 'line 2: the key "data" stands twice'),
        ("data: {train: [}", "not valid YAML"),
        ("- a list", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("data: {train: []}", "name at least one training file"),
        ("data: {train: a}\nname: ../up", "a name is a plain word"),
        ("data: {train: a, held_out: 1.5}", '"data.held_out'),
        (
            "data: {train: a}\nobjective:\n  kind: dpo\n  betta: 1",
            'job.yaml line 4: unknown key "objective.betta"; did you mean "beta"?',
        ),
        ("data: {train: a}\nobjective: {beta: 1}", 'line 2: unknown key "objective.beta"; known here: kind'),
        (
            "data: {train: a}\nobjective: {kind: dpo, beta: 0}",
            'line 2: "objective.beta": input should be greater than 0',
        ),
        ("data: {train: a}\nobjective: {kind: dppo}", "'sft', 'cpt', 'dpo', 'orpo', 'kto'"),
    ],
)
def test_a_fault_is_one_sentence_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.load(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="folder"):
        Recipe.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        Recipe.load(tmp_path / "latin.yaml")


def test_overrides_reach_any_key(tmp_path: Path) -> None:
    path = write(tmp_path, "base: gpt2\ndata: {train: a.jsonl}")
    recipe = Recipe.load(path, ["train.lr=1e-3", "base.revision=abc", "adapter.target_modules=[q_proj]", "name=x"])
    assert (recipe.train.lr, recipe.base.model, recipe.base.revision) == (1e-3, "gpt2", "abc")
    assert recipe.adapter is not None
    assert recipe.adapter.target_modules == ("q_proj",)
    with pytest.raises(InputError, match=r"a\.b=c"):
        Recipe.load(path, ["train.lr"])
    with pytest.raises(InputError, match="did you mean"):
        Recipe.load(path, ["train.epohcs=2"])


def test_hash_follows_what_changes_the_result(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: a.jsonl}")
    recipe = Recipe.load(path)
    assert recipe.hash() == Recipe.load(path, ["name=other", "runtime.threads=1"]).hash()
    assert recipe.hash() != Recipe.load(path, ["train.seed=1"]).hash()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert recipe.hash() == Recipe.load(write(moved, "data: {train: a.jsonl}")).hash()


def test_printed_back_it_reads_the_same(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, "data: {train: [{path: a.jsonl, weight: 2}, b.jsonl], schema: s.json}"))
    assert Recipe.load(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize("what", ["recipe", "schema"])
def test_a_pipe_is_refused_and_never_waited_for(what, tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match=f"a pipe or a device, not a {what}"):
        Recipe.load(pipe) if what == "recipe" else load_schema(str(pipe))
