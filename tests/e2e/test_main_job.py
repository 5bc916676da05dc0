"""The main job on the real base: from rows to a verdict, with every file of the contract, twice the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tunesmith
from contract import ITEM_FIELDS
from stopped import stopped_after
from tunesmith.errors import InputError, InterruptedRun
from tunesmith.models.loading import load_base
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_json, read_metrics

pytestmark = pytest.mark.base
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def recipe(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Forty short rows that a few steps can begin to learn."""
    folder = tmp_path_factory.mktemp("job")
    rows = [
        {
            "input": f"box {i} holds {COLOURS[i % 4]} paint",
            "output": json.dumps({"box": str(i), "paint": COLOURS[i % 4]}),
        }
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "job.yaml").write_text(
        "data: {train: rows.jsonl, held_out: 0.25}\n"
        "train: {max_steps: 4, batch_examples: 4, lr: 2.0e-3, save_every: 2}\n"
        "prove: {contenders: [prompt, few_shot, tuned], few_shot: 2, max_new_tokens: 16, retention: false}\n"
    )
    return Recipe.load(folder / "job.yaml", [f"base={base}"])


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run, proved."""
    folder = tmp_path_factory.mktemp("runs") / "job"
    tunesmith.run(recipe, folder)
    return Run(folder)


def test_every_file_of_the_contract_is_there(done: Run) -> None:
    for path in (
        done.recipe,
        done.lineage,
        done.data_report,
        done.plan,
        done.metrics,
        done.items,
        done.report,
        done.page,
    ):
        assert path.is_file(), path.name
    assert {path.name for path in done.adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    steps = [row for row in read_metrics(done) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(row["computed_tokens"] < row["tokens"] for row in steps)
    scored = [row for row in read_metrics(done) if "held_out_loss" in row]
    assert [row["step"] for row in scored] == [1, 2, 3, 4]
    assert all(0 <= row["score"] <= 1 for row in scored)  # the main scorer, through the engine, as it learns
    lineage, plan = read_json(done.lineage), read_json(done.plan)
    assert lineage["recipe_hash"] == Recipe.load(done.recipe).hash()
    assert plan["actual"]["tokens"] == sum(row["tokens"] for row in steps)


def test_the_report_is_the_contracts(done: Run) -> None:
    report = read_json(done.report)
    assert [each["name"] for each in report["contenders"]] == ["prompt", "few_shot", "tuned"]
    assert report["verdict"]["decision"] in {"ship", "prompt", "retrieve", "hold", "too-few-items"}
    for each in report["contenders"]:
        score = each["scores"][report["scorer"]]
        assert score["ci"][0] <= score["mean"] <= score["ci"][1]
    rows = [json.loads(line) for line in done.items.read_text().splitlines()]
    answered = [row for row in rows if "contender" in row]
    assert set(answered[0]) >= ITEM_FIELDS
    page = done.page.read_text()
    assert "http://" not in page.split("<body", 1)[0]
    assert "<script src" not in page


def test_every_number_comes_from_the_items_alone(done: Run) -> None:
    before = done.report.read_bytes()
    tunesmith.prove(done.folder, from_items=True)
    assert done.report.read_bytes() == before


def test_a_run_is_proved_again_in_another_way_and_never_trained_in_another(done: Run) -> None:
    with pytest.raises(InputError, match="only keys of prove and runtime"):
        tunesmith.prove(done.folder, overrides=["data.system=Another."])
    report = tunesmith.prove(done.folder, overrides=["prove.contenders=[tuned]"])
    assert [each.name for each in report.results] == ["tuned"]
    tunesmith.prove(done.folder)
    assert len(read_json(done.report)["contenders"]) == 3


def test_peft_finds_the_logits_that_were_trained(done: Run, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = [1, 4093, 198, 2683, 28, 216, 33, 2]
    engine = tunesmith.Engine(str(base), adapters={"job": done.adapter})
    ours = engine.logprobs(ids[:4], ids[4:], adapter="job")
    plain = engine.logprobs(ids[:4], ids[4:])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), done.adapter)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    theirs = [float(logits[i - 1, ids[i]]) for i in range(4, 8)]
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours != pytest.approx(plain, abs=1e-2)


def test_the_same_recipe_gives_the_same_bytes_also_when_interrupted(recipe: Recipe, done: Run, tmp_path: Path) -> None:
    """Stopped after two steps and resumed, the adapter is byte for byte that of the run that went through."""
    with stopped_after(2), pytest.raises(InterruptedRun, match="--resume"):
        tunesmith.train(recipe, tmp_path / "job")
    again = tunesmith.train(recipe, tmp_path / "job", resume=True)
    weights = "adapter_model.safetensors"
    assert (again.adapter / weights).read_bytes() == (done.adapter / weights).read_bytes()
    assert [row["step"] for row in read_metrics(again) if "loss" in row] == [1, 2, 3, 4]


def test_the_merged_export_answers_as_the_adapter(done: Run, base: Path, tmp_path: Path) -> None:
    from tunesmith import pipeline

    merged = load_base(str(pipeline.export(done.folder, tmp_path / "merged", to="merged")))
    ids = [1, 4093, 198, 2683, 28, 216, 33, 2]
    ours = tunesmith.Engine(str(base), adapters={"job": done.adapter}).logprobs(ids[:4], ids[4:], adapter="job")
    with torch.no_grad():
        logits = merged.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [float(logits[i - 1, ids[i]]) for i in range(4, 8)] == pytest.approx(ours, abs=1e-3)
