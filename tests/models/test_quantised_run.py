"""A run over a quantised base is proved, verified, served and merged over the very same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import TOKENS, write_model

import tiny_llama
import tunesmith
from tunesmith import Engine, Request
from tunesmith.conversation import open_conversation
from tunesmith.errors import InputError
from tunesmith.models.lora import LoraLinear
from tunesmith.models.packed import PackedLinear
from tunesmith.models.quantised import QuantisedLinear
from tunesmith.pipeline import export
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_json, write_json

TEMPLATE = "{% for m in messages %}<{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
ROWS = [{"input": f"{i:02}", "output": "odd" if i % 2 else "even"} for i in range(40)]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))


def base_of(how: str, folder: Path) -> Path:
    """A random model: a folder, or for `keep` a GGUF file of Q4_1 and Q8_0 blocks."""
    sizes: dict[str, Any] = {"max_position_embeddings": 128, "initializer_range": 0.2, "hidden_size": 64}
    if how != "keep":
        path = tiny_llama.save(folder / "base", **sizes)
        config = path / "tokenizer_config.json"
        config.write_text(json.dumps(read_json(config) | {"chat_template": TEMPLATE.replace("|end|", "|endoftext|")}))
        return path
    model = tiny_llama.llama(vocab_size=len(TOKENS), **sizes)
    return write_model(folder / "base.gguf", model, "llama", quantise="Q4_1", tokenizer__chat_template=TEMPLATE)


def recipe(folder: Path, base: Path, how: str | None, steps: int = 60, **keys: Any) -> Recipe:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    job = {"base": {"model": str(base), "quantize": how}, "data": {"train": "rows.jsonl"}, **keys}
    job["train"] = {"max_steps": steps, "batch_examples": 8, "lr": 2e-2, "eval_every": 0}
    job["prove"] = {"contenders": ["prompt", "tuned"], "retention": False}
    (folder / "job.yaml").write_text(json.dumps(job))
    return Recipe.load(folder / "job.yaml")


@pytest.mark.parametrize("how", ["nf4", "keep"])
def test_what_was_trained_over_quantised_weights_is_served_over_them(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(how, tmp_path)
    run = tunesmith.train(recipe(tmp_path, base, how), tmp_path / "run")
    record = read_json(run.parity)
    assert record["passed"], record["reason"]
    assert read_json(run.lineage)["quantize"] == how

    copied: list[object] = []
    whole = PackedLinear.__init__
    monkeypatch.setattr(PackedLinear, "__init__", lambda *a, **k: (copied.append(a), whole(*a, **k))[1])
    assert tunesmith.verify(run.folder).passed
    tunesmith.prove(run.folder)
    assert "tuned" in [each["name"] for each in read_json(run.report)["contenders"]]
    assert not copied  # never into copies as numbers

    alone = shutil.copytree(run.adapter, tmp_path / "alone")  # without its run it still says what it stands on
    assert tunesmith.verify(alone).passed
    asked = Request(messages=[{"role": "user", "content": "07"}], adapter="a", max_tokens=8, logprobs=True)
    answer = Engine(base, {"a": alone}, quantize=how).generate([asked])[0]
    assert "".join(open_conversation(str(run.folder), system=None, temperature=0.0, max_tokens=8).ask("07")) == (
        answer.text
    )
    with pytest.raises(InputError, match=f"trained over its base in {how}, and this base is not quantised"):
        Engine(base, {"a": alone})

    merged = export(run.folder, tmp_path / "merged", to="merged")
    plain = Request(messages=asked.messages, max_tokens=8, logprobs=True)
    again = Engine(merged).generate([plain])[0]
    assert again.ids == answer.ids
    torch.testing.assert_close(torch.tensor(again.logprobs), torch.tensor(answer.logprobs), rtol=0, atol=1e-4)


def test_a_lineage_of_other_numbers_is_refused(tmp_path: Path) -> None:
    run = tunesmith.train(recipe(tmp_path, base_of("nf4", tmp_path), "nf4", steps=3), tmp_path / "run")
    write_json(run.lineage, read_json(run.lineage) | {"quantize": None})
    assert "quantised as nf4, not nothing" in (tunesmith.verify(run.folder).reason or "")
    run.recipe.write_text(Recipe.load(run.recipe, ["base.quantize=int8"]).to_yaml())
    assert "trained over its base in nf4" in (tunesmith.verify(run.folder).reason or "")


def test_chat_takes_no_adapter_over_other_numbers(tmp_path: Path) -> None:
    base = base_of("nf4", tmp_path)
    runs: dict[str | None, Run] = {}
    for how in ("nf4", None):
        (tmp_path / str(how)).mkdir()
        runs[how] = tunesmith.train(recipe(tmp_path / str(how), base, how, steps=3), tmp_path / str(how) / "run")
    talk = open_conversation(str(runs["nf4"].folder), system=None, temperature=0.0, max_tokens=4)
    layers = talk.engine._core.adapters._lora.layers.values()
    assert all(isinstance(layer, LoraLinear) and isinstance(layer.base, QuantisedLinear) for layer in layers)
    with pytest.raises(InputError, match="unquantised, and here it is in nf4"):
        talk.switch(str(runs[None].folder))


def test_quantised_weights_are_never_tuned_themselves(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantised weights can't be tuned; give the run an adapter"):
        recipe(tmp_path, tmp_path, "nf4", adapter=None)
    with pytest.raises(InputError, match=r"base\.quantize"):
        recipe(tmp_path, tmp_path, "fp4")
    with pytest.raises(InputError, match=r"keep trains over the blocks of a \.gguf file"):
        tunesmith.train(recipe(tmp_path, base_of("nf4", tmp_path), "keep"), tmp_path / "run")
