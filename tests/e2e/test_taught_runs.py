"""Runs with a teacher over a tiny base: its answers, its distributions, resume, the proof, and what it can do wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import tiny_llama
import tunesmith
from chat_endpoint import last_turn
from stopped import stopped_after
from tunesmith import pipeline
from tunesmith.errors import InputError, InterruptedRun
from tunesmith.progress import Reporter
from tunesmith.proof import SampleScorer
from tunesmith.prove import endpoint
from tunesmith.prove.answering import EngineModel
from tunesmith.recipe import Recipe
from tunesmith.replay import PROMPTS
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
        "train: {max_steps: 24, batch_examples: 4, lr: 1.0e-2, eval_every: 12}\n"
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
    assert found["equivalent"]
    assert found["not_worse"]
    assert found["ci"][0] < 0 < found["ci"][1]  # equal on every item is not equal for certain
    assert found["tokens_saved_per_call"] == len(f"system{PROMPT}") + len("<||>") + 1
    assert report["verdict"]["decision"] == "ship"
    assert f"at {by_name['tuned']['prompt_tokens_mean']:.0f} prompt tokens a call" in report["verdict"]["reason"]
    assert tunesmith.prove(done.folder, from_items=True).to_json() == report


def test_interrupted_and_resumed_nothing_is_asked_twice_and_it_ends_in_the_same_bytes(folder: Path, done: Run) -> None:
    with stopped_after(3), pytest.raises(InterruptedRun, match="--resume"):
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
    assert planned.estimate.steps == 24
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
        ("{kind: compress, prompt_file: nowhere.txt}", "nowhere.txt.*there is no such prompt"),
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


def test_a_model_of_the_same_vocabulary_teaches_by_its_distributions(folder: Path, done: Run) -> None:
    """Here a run: the student learns what it answers to rows without an answer, and keeps those that have one."""
    rows = [{"input": question(i)} for i in range(40)] + [
        {"input": question(i), "output": "red"} for i in range(40, 48)
    ]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = f"{{kind: distill, teacher: {done.folder}, kl_share: 0.8, kl_to_base: 0.01}}"
    run = tunesmith.train(recipe(folder, objective, data="mixed.jsonl"), folder / "distilled")
    steps = [row for row in read_metrics(run) if "loss" in row]
    for each in steps:
        parts = 0.8 * each["kl"] + 0.2 * each["nll"] + 0.01 * each["kl_to_base"]
        assert each["loss"] == pytest.approx(parts, rel=1e-6)
    assert steps[0]["kl_to_base"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["kl_to_base"] > 0.1
    assert steps[-1]["kl"] < steps[0]["kl"]
    facts, *lessons = [json.loads(line) for line in run.lessons.read_text().splitlines()]
    assert facts["teacher"] == str(done.folder)
    assert {each["answer"] for each in lessons} <= {"red", "blue"}
    assert all(f"line {n}" not in each["source"] for n in range(41, 49) for each in lessons)


def test_a_teacher_of_another_vocabulary_is_refused(folder: Path) -> None:
    other = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    other.add_tokens(["<more>"])
    other.save_pretrained(folder / "other")
    tiny_llama.llama(vocab_size=258).save_pretrained(folder / "other")
    with pytest.raises(InputError, match=r"another vocabulary than .*258 and 257 tokens.*MODEL@URL"):
        tunesmith.train(recipe(folder, f"{{kind: distill, teacher: {folder / 'other'}}}"), folder / "refused")
    assert not Run(folder / "refused").exists()
    student = recipe(folder, f"{{kind: distill, teacher: {folder / 'base'}}}", f"base={folder / 'other'}")
    with pytest.raises(InputError, match=r"another vocabulary than .*257 and 258 tokens.*MODEL@URL"):
        tunesmith.train(student, folder / "refused")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint is asked again at once."""
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)


def test_an_endpoint_teaches_by_its_answers_and_what_is_no_use_is_counted(folder: Path, serve, impatient) -> None:
    """Busy calls are made again; junk, nothing and what the schema forbids are left out."""
    (folder / "schema.json").write_text('{"type": "object", "required": ["colour"]}')

    busy: set[str] = set()

    def answer(number: int, body: dict[str, Any]) -> tuple[int, object]:
        text = last_turn(body)
        if int(text) % 3 == 0 and text not in busy:  # the first time it is asked
            busy.add(text)
            return 429, {}
        kind = int(text) % 10
        return 200, {0: {"choices": []}, 1: "", 2: '{"color": 1}', 3: "red"}.get(kind, '{"colour": "red"}')

    name = serve(answer).name
    run = tunesmith.train(
        recipe(folder, f"{{kind: distill, teacher: '{name}'}}", "data.schema=schema.json", "train.max_steps=4"),
        folder / "served",
    )
    facts, *lessons = [json.loads(line) for line in run.lessons.read_text().splitlines()]
    assert {each["answer"] for each in lessons} == {'{"colour": "red"}', None}
    assert facts["left_out"].keys() == {
        "the endpoint's answer is not a chat completion", "empty", "not what data.schema allows",
    }  # fmt: skip
    assert sum(facts["left_out"].values()) == sum(each["answer"] is None for each in lessons)
    assert "kl" not in next(row for row in read_metrics(run) if "loss" in row)  # answers alone: no distributions


def test_an_endpoint_that_stops_answering_ends_the_run_and_is_asked_for_the_rest_later(
    folder: Path, serve, impatient
) -> None:
    alive = [True]
    server = serve(lambda number, body: (200, "red") if alive[0] and number <= 20 else (503, {}))
    taught = recipe(folder, f"{{kind: distill, teacher: '{server.name}'}}")
    with pytest.raises(InputError, match=r"stopped answering \(the endpoint answered 503.*20 of \d+ answers are kept"):
        tunesmith.train(taught, folder / "cut")
    known = set(server.asked()[:20])
    alive[0] = False
    server.calls.clear()
    with pytest.raises(InputError, match=r"stopped answering.*20 of"):
        tunesmith.train(taught, folder / "cut", resume=True)
    assert server.calls
    assert not known & set(server.asked())


def test_an_endpoint_that_cannot_be_reached_or_says_no_is_one_sentence(folder: Path, serve, impatient) -> None:
    server = serve(lambda number, body: (401, {}))
    with pytest.raises(InputError, match=r"stopped answering.*401"):
        tunesmith.train(recipe(folder, f"{{kind: distill, teacher: '{server.name}'}}"), folder / "no")
    assert len(server.calls) <= 16  # a refusal is not asked for again and again
    with pytest.raises(InputError, match="could not be reached"):
        tunesmith.train(recipe(folder, "{kind: distill, teacher: 'big@http://127.0.0.1:9/v1'}"), folder / "no")


def test_a_share_of_the_examples_is_the_base_answering_general_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"input": question(i), "output": "red"} for i in range(40)]
    (folder / "red.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = []
    fit = pipeline.fit
    monkeypatch.setattr(
        pipeline, "fit", lambda ready, *rest, **named: prepared.append(ready) or fit(ready, *rest, **named)
    )
    run = tunesmith.train(recipe(folder, "{kind: sft}", "data.replay=0.2", data="red.jsonl"), folder / "replayed")
    ids = [each.example_id for each in prepared[0].train.examples]
    places = [i for i, each in enumerate(ids) if each.startswith("replay ")]
    assert len(places) == round(0.25 * (len(ids) - len(places)))
    assert max(b - a for a, b in itertools.pairwise(places)) <= 6  # spread among the others
    first = prepared[0].train.examples[places[0]]
    said = prepared[0].renderer.decode(first.input_ids.tolist())
    asked = PROMPTS.read_text().splitlines()
    assert any(prompt in said for prompt in asked)
    assert sum("eh" in json.loads(line)["output"] for line in run.replies.read_text().splitlines()) > 0
    with pytest.raises(InputError, match=r"data\.replay.*compress learns otherwise"):
        tunesmith.train(recipe(folder, COMPRESS, "data.replay=0.2"), folder / "not-replayed")


def test_what_is_replayed_is_not_what_retention_is_measured_on() -> None:
    lines = (PROMPTS.parents[1] / "prove" / "data" / "general_prompts.jsonl").read_text().splitlines()
    assert not {json.loads(line)["prompt"] for line in lines} & set(PROMPTS.read_text().splitlines())


def test_patience_that_could_never_see_anything_is_refused(folder: Path) -> None:
    for key in ("train.eval_every", "data.held_out"):
        with pytest.raises(InputError, match=rf"yaml: train\.patience waits for better evaluations, and {key} is 0"):
            recipe(folder, "{kind: sft}", f"{key}=0", "train.patience=2")


def test_a_run_that_was_better_before_its_end_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input": question(i), "output": "red"} for i in range(40)]
    (folder / "red.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = iter((0.9, 0.2))
    monkeypatch.setattr(SampleScorer, "mean", lambda self: next(scores))
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    tunesmith.train(recipe(folder, "{kind: sft}", data="red.jsonl"), folder / "late", reporter=reporter)
    assert any("at their best after step 12 of 24" in each for each in said)
