"""The parity gate: what would be served otherwise than it was trained is refused, with the reason."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tunesmith
from tiny_llama import save
from tunesmith import cli, trainable
from tunesmith.errors import RefusedError
from tunesmith.models.peft_format import CONFIG, WEIGHTS
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_json, read_metrics, write_json

TEMPLATE = "{% for m in messages %}<{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of a few kilobytes, with a chat template."""
    folder = save(tmp_path_factory.mktemp("tiny") / "base", max_position_embeddings=128, initializer_range=0.2)
    set_template(folder, TEMPLATE)
    return folder


def set_template(folder: Path, template: str, **special: str) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"chat_template": template} | special))


def recipe(folder: Path, base: Path, steps: int = 60, **keys: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    rows = [{"input": f"{i:02}", "output": "odd" if i % 2 else "even"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {"base": str(base), "data": {"train": "rows.jsonl"}, **keys}
    job["train"] = {"max_steps": steps, "batch_examples": 8, "lr": 2e-2, "eval_every": 0}
    (folder / "job.yaml").write_text(json.dumps(job))
    return Recipe.load(folder / "job.yaml")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("trained")
    return tunesmith.train(recipe(folder, base), folder / "run")


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy to spoil, over a base of its own."""
    run = Run(shutil.copytree(trained.folder, tmp_path / "run"))
    own = shutil.copytree(Path(Recipe.load(run.recipe).base.model), tmp_path / "base")
    run.recipe.write_text(Recipe.load(run.recipe, [f"base.model={own}"]).to_yaml())
    return run


def base_of(run: Run) -> Path:
    return Path(Recipe.load(run.recipe).base.model)


def test_what_was_trained_is_published_with_what_the_trainer_said(trained: Run) -> None:
    record = read_json(trained.parity)
    assert record["passed"], record["reason"]
    assert {check["name"] for check in record["checks"] if check["passed"]} == {
        "base", "template", "prompt", "effect", "log-probs", "end",
    }  # fmt: skip
    assert len(record["rows"]) == 4
    assert all(len(row["logprobs"]) == len(row["answer_ids"]) for row in record["rows"])
    assert tunesmith.verify(trained.folder).passed
    assert tunesmith.verify(trained.adapter).passed
    assert {path.name for path in trained.folder.iterdir()} >= {"adapter", "parity.json"}
    assert not list(trained.folder.glob(".adapter*"))


def test_another_base_is_refused_by_its_hash_and_by_what_it_says(run: Run) -> None:
    weights = load_file(base_of(run) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name] * 1.05}, base_of(run) / "model.safetensors", metadata={"format": "pt"})
    failed = {check.name for check in tunesmith.verify(run.folder).checks if check.passed is False}
    assert failed >= {"base", "log-probs"}


def test_an_adapter_without_effect_is_refused(run: Run) -> None:
    tensors = load_file(run.adapter / WEIGHTS)
    save_file({k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}, run.adapter / WEIGHTS)
    assert "changes nothing" in (tunesmith.verify(run.folder).reason or "")
    save_file({}, run.adapter / WEIGHTS)
    assert "empty" in (tunesmith.verify(run.folder).reason or "")


def test_an_adapter_applied_with_another_scaling_is_refused(run: Run) -> None:
    config = read_json(run.adapter / CONFIG)
    write_json(run.adapter / CONFIG, config | {"lora_alpha": config["lora_alpha"] * 1.02})
    found = tunesmith.verify(run.folder)
    assert [check.name for check in found.checks if check.passed is False] == ["log-probs"]


def test_a_changed_template_is_refused(run: Run) -> None:
    set_template(base_of(run), TEMPLATE.replace("<{{", "< {{"))
    found = tunesmith.verify(run.folder)
    assert "template" in (found.reason or "")
    assert [check.name for check in found.checks if check.passed is False] == ["template", "prompt"]


def test_a_prompt_opened_twice_is_never_published(base: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    set_template(own, "{{ bos_token }}{{ bos_token }}" + TEMPLATE, bos_token="<|endoftext|>")
    with pytest.raises(RefusedError, match=r"opens with <\|endoftext\|> twice"):
        tunesmith.train(recipe(tmp_path / "job", own, steps=2), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    assert (tmp_path / "run" / "adapter.refused" / WEIGHTS).is_file()


def test_a_run_too_short_to_learn_where_answers_end_is_kept_but_not_served(base: Path, tmp_path: Path) -> None:
    run = tunesmith.train(recipe(tmp_path / "job", base, steps=1), tmp_path / "run")
    assert (run.adapter / WEIGHTS).is_file()
    assert "it would go on" in (tunesmith.verify(run.folder).reason or "")


def test_an_adapter_saved_empty_is_not_published(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainable.save_adapter

    def save_zeros(lora: Any, name: str, *rest: Any) -> None:
        for key, weights in lora.parameters(name):
            weights.data.mul_(0.0 if "lora_B" in key else 1.0)
        whole(lora, name, *rest)

    monkeypatch.setattr(trainable, "save_adapter", save_zeros)
    with pytest.raises(RefusedError, match="changes nothing"):
        tunesmith.train(recipe(tmp_path / "job", base, steps=2), tmp_path / "run")


def test_every_weight_tuned_passes_the_same_gate(base: Path, tmp_path: Path) -> None:
    whole = tunesmith.train(recipe(tmp_path / "job", base, adapter=None), tmp_path / "run")
    assert tunesmith.verify(whole.folder).passed
    for file in base.glob("model.safetensors"):
        shutil.copy(file, whole.model)
    failed = {check.name for check in tunesmith.verify(whole.folder).checks if check.passed is False}
    assert failed >= {"effect", "log-probs"}


def test_magnitudes_and_both_ends_pass_the_same_gate_and_are_continued(base: Path, tmp_path: Path) -> None:
    keys = {"kind": "dora", "rank": 4, "rslora": True, "target_modules": ".*(proj|embed_tokens|lm_head)"}
    first = tunesmith.train(recipe(tmp_path / "job", base, adapter=keys), tmp_path / "first")
    again = recipe(tmp_path / "job", base, steps=2, adapter={**keys, "init_from": str(first.adapter)})
    second = tunesmith.train(again, tmp_path / "second")
    for run in (first, second):
        assert tunesmith.verify(run.folder).passed
        assert read_json(run.adapter / CONFIG)["use_dora"]
    losses = [read_metrics(run)[0]["loss"] for run in (first, second)]
    assert losses[1] < losses[0] / 10, "it began anew"


def test_an_adapter_from_elsewhere_is_held_to_the_trainers_own_computation(trained: Run, tmp_path: Path) -> None:
    alone = shutil.copytree(trained.adapter, tmp_path / "alone")
    config = read_json(alone / CONFIG)
    write_json(alone / CONFIG, config | {"base_model_name_or_path": str(base_of(trained))})
    found = tunesmith.verify(alone)
    assert found.passed
    assert {check.name: check.passed for check in found.checks} == {
        "base": None, "template": None, "prompt": True, "effect": True, "log-probs": True, "end": None,
    }  # fmt: skip


def test_the_command_exits_3_and_says_why(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(run.lineage, read_json(run.lineage) | {"chat_template_hash": "another"})
    monkeypatch.setattr(sys, "argv", ["tunesmith", "verify", str(run.folder), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert "chat template" in json.loads(capsys.readouterr().out)["reason"]
