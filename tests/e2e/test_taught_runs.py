"""Runs with a teacher over a tiny base: its answers, its distributions, resume, the proof, and what it can do wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import tiny_llama
import tunesmith
from tunesmith.errors import InputError, InterruptedRun
from tunesmith.fitting import _Watch
from tunesmith.prove.answering import EngineModel
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_json, read_metrics
from tunesmith.teaching import TRIED

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WEIGHTS = "adapter_model.safetensors"
PROMPT = "Even is red and odd is blue."
STEPS = 140


def question(i: int) -> str:
    return f"{i * 7919 % 1000:03d}"


def obedient(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """With the prompt it answers by the question's last digit, without it always the same."""
    model = tiny_llama.llama(max_position_embeddings=512)
    texts = []
    for i in range(40):
        asked = [{"role": "user", "content": question(i)}]
        colour = ("red", "blue")[int(question(i)[-1]) % 2]
        for turns, answer in (([{"role": "system", "content": PROMPT}, *asked], colour), (asked, "eh")):
            said = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            texts.append((tokenizer(said)["input_ids"], tokenizer(answer)["input_ids"] + [0]))
    longest = max(len(asked) + len(said) for asked, said in texts)
    ids, labels = torch.zeros(len(texts), longest, dtype=torch.long), torch.full((len(texts), longest), -100)
    for row, (asked, said) in enumerate(texts):
        ids[row, : len(asked) + len(said)] = torch.tensor(asked + said)
        labels[row, len(asked) : len(asked) + len(said)] = torch.tensor(said)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has learned to obey one prompt, and 150 questions without answers."""
    folder = tmp_path_factory.mktemp("taught")
    tokenizer = tiny_llama.tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "base")
    obedient(tokenizer).save_pretrained(folder / "base")
    rows = [{"input": question(i)} for i in range(150)]
    (folder / "inputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, objective: str, *overrides: str, data: str = "inputs.jsonl") -> Recipe:
    (folder / "taught.yaml").write_text(
        f"base: base\ndata: {{train: {data}, held_out: 0.5}}\n"
        f"objective: {objective}\n"
        "train: {max_steps: 12, batch_examples: 4, lr: 1.0e-2, eval_every: 6}\n"
        "prove: {few_shot: 2, max_new_tokens: 8, retention: false, scorers: [chrf]}\n"
        "runtime: {memory_limit: 4GB}\n"
    )
    return Recipe.load(folder / "taught.yaml", [f"base={folder / 'base'}", *overrides])


COMPRESS = f'{{kind: compress, prompt: "{PROMPT}", top_k: 8}}'


@pytest.fixture(scope="module")
def done(folder: Path) -> Run:
    tunesmith.run(recipe(folder, COMPRESS), folder / "run")
    return Run(folder / "run")


def test_a_prompt_is_compressed_from_inputs_alone_and_proved(done: Run) -> None:
    rows, report = read_metrics(done), read_json(done.report)
    steps, evals = ([row for row in rows if key in row] for key in ("loss", "held_out_loss"))
    assert steps[0]["loss"] == pytest.approx(steps[0]["kl"])
    assert evals[-1]["held_out_token_accuracy"] > 0.95
    by_name = {each["name"]: each for each in report["contenders"]}
    assert list(by_name) == ["prompt", "tuned"]  # the default: the prompt is what the tune has to be as good as
    assert by_name["prompt"]["scores"]["chrf"]["mean"] == 1  # its own answers are what is expected
    found = report["compression"]
    assert found["equivalent"] and found["not_worse"]
    assert found["ci"][0] < 0 < found["ci"][1]  # equal on every item is not equal for certain
    assert found["tokens_saved_per_call"] == len(f"system{PROMPT}") + len("<||>") + 1
    assert report["verdict"]["decision"] == "ship"
    assert f"at {by_name['tuned']['prompt_tokens_mean']:.0f} prompt tokens a call" in report["verdict"]["reason"]
    assert tunesmith.prove(done.folder, from_items=True).to_json() == report


def test_interrupted_and_resumed_nothing_is_asked_twice_and_it_ends_in_the_same_bytes(
    folder: Path, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _Watch._step

    def stop_after_three(self: _Watch, metrics: object) -> None:
        record(self, metrics)  # type: ignore[arg-type]
        self._asked_to_stop = metrics.step == 3  # type: ignore[attr-defined]

    with monkeypatch.context() as patch:
        patch.setattr(_Watch, "_step", stop_after_three)
        with pytest.raises(InterruptedRun, match="--resume"):
            tunesmith.train(recipe(folder, COMPRESS), folder / "again")
    asked = Run(folder / "again").replies.read_bytes()
    again = tunesmith.train(recipe(folder, COMPRESS), folder / "again", resume=True)
    assert again.replies.read_bytes() == asked
    assert (again.adapter / WEIGHTS).read_bytes() == (done.adapter / WEIGHTS).read_bytes()
    changed = recipe(folder, COMPRESS, "objective.prompt=Even is red.")
    with pytest.raises(InputError, match="changed since this run was started"):
        tunesmith.train(changed, folder / "again", resume=True)


def test_a_plan_asks_a_few_and_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answer = EngineModel.answer
    monkeypatch.setattr(EngineModel, "answer", lambda self, p, *rest: asked.extend(p) or answer(self, p, *rest))
    before = sorted(folder.iterdir())
    planned = tunesmith.plan(recipe(folder, COMPRESS))
    assert len(asked) == TRIED
    assert planned.estimate.steps == 12
    assert sorted({*folder.iterdir()} - {*before}) in ([], [folder / "taught.yaml"])
    with pytest.raises(InputError, match="--data-need"):
        tunesmith.plan(recipe(folder, COMPRESS), data_need=True)


def test_rows_without_answers_are_only_for_objectives_with_a_teacher(folder: Path) -> None:
    with pytest.raises(InputError, match=r'line 1: .*no "output"'):
        tunesmith.train(recipe(folder, "{kind: sft}"), folder / "refused")
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("{kind: compress}", "either prompt or prompt_file"),
        ("{kind: compress, prompt: ' '}", "prompt is empty"),
        ("{kind: compress, prompt_file: nowhere.txt}", "nowhere.txt.*cannot be read"),
        ("{kind: compress, prompt_file: open.json}", "ends in a question"),
        ("{kind: compress, prompt_file: torn.json}", "not valid JSON"),
        (f"{{kind: compress, prompt: {'x' * 600}}}", "no answer to learn from.*the prompt has"),
    ],
)
def test_a_prompt_that_is_none_is_refused_in_a_sentence(folder: Path, objective: str, said: str) -> None:
    (folder / "open.json").write_text('[{"role": "user", "content": "and?"}]')
    (folder / "torn.json").write_text("[{")
    with pytest.raises(InputError, match=said):
        tunesmith.train(recipe(folder, objective), folder / "no-prompt")
    assert not Run(folder / "no-prompt").exists()
