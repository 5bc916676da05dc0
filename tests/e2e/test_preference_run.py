"""A preference run over a tiny base: gate, plan, columns, training, resume, evaluation, proof."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import tiny_llama
import tunesmith
from stopped import stopped_after
from tunesmith.errors import InputError, InterruptedRun
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_json, read_metrics

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of a few kilobytes and twenty pairs, half of them in OpenAI's spelling."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_llama.llama(max_position_embeddings=256).save_pretrained(folder / "base")
    tokenizer = tiny_llama.tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "base")
    colours = ("red", "green", "blue", "white")
    rows = [{"prompt": f"paint {i}?", "chosen": colours[i % 4], "rejected": colours[i % 4].upper()} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, objective: str, *overrides: str) -> Recipe:
    (folder / f"{objective}.yaml").write_text(
        "base: base\ndata: {train: pairs.jsonl, held_out: 0.25}\n"
        f"objective: {{kind: {objective}, beta: 0.2}}\n"
        "train: {max_steps: 6, batch_examples: 4, lr: 1.0e-2, eval_every: 3}\n"
        "prove: {contenders: [prompt, few_shot, tuned], few_shot: 2, max_new_tokens: 4, retention: false}\n"
        "runtime: {memory_limit: 4GB}\n"
    )
    return Recipe.load(folder / f"{objective}.yaml", [f"base={folder / 'base'}", *overrides])


@pytest.fixture(scope="module")
def done(folder: Path) -> Run:
    tunesmith.run(recipe(folder, "dpo"), folder / "run")
    return Run(folder / "run")


def test_a_preference_run_is_measured_and_proved(done: Run) -> None:
    rows = read_metrics(done)
    steps, evals = ([row for row in rows if key in row] for key in ("loss", "held_out_loss"))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert steps[-1]["reward_margin"] > steps[0]["reward_margin"]
    assert all(row["examples"] == 4 and row["computed_tokens"] < row["tokens"] for row in steps)
    assert [row["step"] for row in evals] == [3, 6]
    assert evals[-1]["held_out_loss"] < math.log(2)
    assert {"held_out_reward_accuracy", "held_out_reward_margin", "held_out_token_accuracy"} <= evals[-1].keys()
    assert read_json(done.plan)["predicted"]["seconds"] > 0
    report = read_json(done.report)
    assert [each["name"] for each in report["contenders"]] == ["prompt", "few_shot", "tuned"]
    assert report["contenders"][0]["scores"][report["scorer"]]["n"] > 0  # held-out items expect the chosen answer


def test_interrupted_and_resumed_it_ends_in_the_same_bytes(folder: Path, done: Run) -> None:
    """The reference is the one of before the first step, also when the run is resumed."""
    for name, lose_columns in (("kept", False), ("lost", True)):
        with stopped_after(3), pytest.raises(InterruptedRun, match="--resume"):
            tunesmith.train(recipe(folder, "dpo"), folder / name)
        if lose_columns:
            Run(folder / name).columns.unlink()
        again = tunesmith.train(recipe(folder, "dpo"), folder / name, resume=True)
        assert (again.adapter / WEIGHTS).read_bytes() == (done.adapter / WEIGHTS).read_bytes()
        assert [row["step"] for row in read_metrics(again) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_the_reference_of_a_tune_that_goes_on_is_the_earlier_tune(folder: Path, done: Run) -> None:
    run = tunesmith.train(recipe(folder, "dpo", f"adapter.init_from={done.adapter}"), folder / "on")
    assert next(row["loss"] for row in read_metrics(run)) == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_every_weight_can_learn_preferences(folder: Path, objective: str) -> None:
    run = tunesmith.train(recipe(folder, objective, "adapter=null", "train.lr=1e-3"), folder / f"full-{objective}")
    steps = [row for row in read_metrics(run) if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(row["examples"] == 4 for row in steps)
    assert run.tuned() == run.model


@pytest.mark.parametrize(
    ("row", "objective", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "dpo", "line 41: .*same answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "sft", "line 1: .*preference pair.*objective.kind"),
    ],
)
def test_what_cannot_be_preferred_is_refused_by_line(folder: Path, row: dict, objective: str, said: str) -> None:
    text = (folder / "pairs.jsonl").read_text()
    (folder / "bad.jsonl").write_text(text + json.dumps(row) + "\n")
    beta = [] if objective == "sft" else ["objective.beta=0.2"]
    bad = Recipe.of_data(folder / "bad.jsonl", [f"base={folder / 'base'}", f"objective.kind={objective}", *beta])
    with pytest.raises(InputError, match=said):
        tunesmith.train(bad, folder / f"refused-{objective}")
    assert not (folder / f"refused-{objective}").exists()
