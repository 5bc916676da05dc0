"""Instruction tuning of a base without chat template: it gets one, its new tokens are learned, and it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_llama
import tunesmith
from tunesmith import pipeline
from tunesmith.conversation import open_conversation
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Request
from tunesmith.errors import InputError
from tunesmith.models.loading import load_base
from tunesmith.models.peft_format import CONFIG
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_json

ASKED = [{"role": "user", "content": "07"}]
FILE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def recipe(folder: Path, base: Path, steps: int = 60, template: str | None = None, **keys: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"input": f"{i:02}", "output": "odd" if i % 2 else "even"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"max_steps": steps, "batch_examples": 8, "lr": 2e-2, "eval_every": 0}
    prove = {"contenders": ["prompt", "tuned"], "retention": False, "max_new_tokens": 8}
    job = {
        "base": {"model": str(base), "chat_template": template},
        "data": {"train": "rows.jsonl"},
        "train": settings,
        "prove": prove,
        **keys,
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    return Recipe.load(folder / "job.yaml")


def raw_base(folder: Path, tied: bool) -> Path:
    sizes = {"max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": tied}
    return tiny_llama.save(folder / "base", **sizes)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("raw")
    tunesmith.run(recipe(folder, raw_base(folder, request.param)), folder / "run")
    return Run(folder / "run")


def engine_for(run: Run) -> Engine:
    return Engine(Recipe.load(run.recipe).base.model, adapters={"t": run.adapter})


def test_the_tuned_model_answers_and_stops_at_a_token_the_base_never_had(done: Run) -> None:
    answer = engine_for(done).generate([Request(messages=ASKED, adapter="t", max_tokens=20)])[0]
    assert (answer.text, answer.finish_reason, answer.ids[-1]) == ("odd", "stop", 258)
    assert tunesmith.verify(done.folder).passed
    assert tunesmith.verify(done.adapter).passed
    scores = {each["name"]: each["scores"] for each in read_json(done.report)["contenders"]}
    assert scores["tuned"]["exact_match"]["mean"] > scores["prompt"]["exact_match"]["mean"]
    talk = open_conversation(str(done.adapter), system=None, temperature=0.0, max_tokens=20)
    assert "".join(talk.ask("07")) == "odd"


def test_peft_loads_it_on_the_resized_base_with_the_tokenizer_beside_it(done: Run) -> None:
    base = Recipe.load(done.recipe).base.model
    tokenizer = AutoTokenizer.from_pretrained(done.adapter)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\n07<|im_end|>\n<|im_start|>assistant\n"
    model = AutoModelForCausalLM.from_pretrained(base)
    tied = model.config.tie_word_embeddings
    model.resize_token_embeddings(len(tokenizer))
    model = PeftModel.from_pretrained(model, done.adapter).eval()
    ends = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    assert read_json(done.adapter / CONFIG)["trainable_token_indices"] == {end: [257, 258] for end in ends}
    answer = tokenizer("odd<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    theirs = [float(logprobs[len(ids) + i - 1, token]) for i, token in enumerate(answer)]
    assert engine_for(done).logprobs(ids, answer, adapter="t") == pytest.approx(theirs, abs=1e-4)


def test_merged_it_is_a_model_of_its_own(done: Run, tmp_path: Path) -> None:
    merged = pipeline.export(done.folder, tmp_path / "merged", to="merged")
    engine, ids = Engine(merged), engine_for(done).renderer.prompt_ids(ASKED)
    assert engine.generate([Request(messages=ASKED, max_tokens=20)])[0].text == "odd"
    expected = engine_for(done).logprobs(ids, [80, 69, 258], adapter="t")
    assert engine.logprobs(ids, [80, 69, 258]) == pytest.approx(expected, abs=1e-4)


def test_an_engine_that_speaks_otherwise_refuses_it(done: Run) -> None:
    engine = Engine(Recipe.load(done.recipe).base.model)
    with pytest.raises(InputError, match="by different chat templates"):
        engine.add_adapter("t", done.adapter)


def test_it_is_continued_with_the_rows_it_has(done: Run, tmp_path: Path) -> None:
    base = Path(Recipe.load(done.recipe).base.model)
    again = tunesmith.train(recipe(tmp_path, base, 2, adapter={"init_from": str(done.adapter)}), tmp_path / "run")
    assert tunesmith.verify(again.folder).passed, "it began anew"


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_tuned_it_is_a_resized_model_that_transformers_runs(tied: bool, tmp_path: Path) -> None:
    run = tunesmith.train(recipe(tmp_path, raw_base(tmp_path, tied), adapter=None), tmp_path / "run")
    assert tunesmith.verify(run.folder).passed
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.model), AutoTokenizer.from_pretrained(run.model)
    assert model.config.vocab_size == len(tokenizer) == 259
    shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (shared, model.config.tie_word_embeddings) == (tied, tied)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    said = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    assert tokenizer.decode(said) == "odd<|im_end|>"
    assert Engine(run.model).generate([Request(messages=ASKED, max_tokens=20)])[0].ids == said


def test_a_template_from_a_file_and_tokens_that_the_vocabulary_has_already(tmp_path: Path) -> None:
    base = raw_base(tmp_path, True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    tiny_llama.llama(vocab_size=300, max_position_embeddings=128, initializer_range=0.2).save_pretrained(base)
    (tmp_path / "own.jinja").write_text(FILE)
    job = recipe(tmp_path / "job", base, template="../own.jinja")
    run = tunesmith.train(job, tmp_path / "run")
    assert tunesmith.verify(run.folder).passed
    assert read_json(run.adapter / CONFIG)["trainable_token_indices"]["embed_tokens"] == [257, 258]
    assert load_base(str(base)).model.get_input_embeddings().weight.shape[0] == 300
    answer = engine_for(run).generate([Request(messages=ASKED, adapter="t", max_tokens=20)])[0]
    assert (answer.text in ("odd", "even"), answer.finish_reason, answer.ids[-1]) == (True, "stop", 257)


def test_what_cannot_be_a_template_is_a_sentence(tmp_path: Path) -> None:
    base = raw_base(tmp_path, True)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    for name, said in (("bad.jinja", "no chat template"), ("none.jinja", "cannot be read")):
        job = recipe(tmp_path, base, template=name)
        with pytest.raises(InputError, match=said):
            tunesmith.train(job, tmp_path / "run")
    ends = recipe(tmp_path, base, adapter={"target_modules": ["lm_head"]})
    with pytest.raises(InputError, match="need for themselves"):
        tunesmith.train(ends, tmp_path / "run")


def test_a_teacher_that_does_not_know_the_templates_tokens_is_refused_with_the_way_out(tmp_path: Path) -> None:
    base = raw_base(tmp_path, tied=True)
    objective = {"kind": "distill", "teacher": str(base)}
    with pytest.raises(InputError, match=r"does not know <\|im_start\|>, <\|im_end\|>,.*chat_template: plain"):
        tunesmith.train(recipe(tmp_path, base, steps=1, objective=objective), tmp_path / "refused")
    run = tunesmith.train(recipe(tmp_path, base, 1, "plain", objective=objective), tmp_path / "taught")
    assert run.adapter.is_dir()
