"""Several processes are one: the same gradient, the same checkpoints, and when one dies the run says so and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import team_work
import torch
from safetensors.torch import load_file

import tunesmith
from decoders import example, worst_error
from small_jobs import make_questions
from stopped import stopped_after
from tunesmith import stopping, workers
from tunesmith.data.batches import Layout, make_step
from tunesmith.errors import InputError, InterruptedRun, RefusedError, TunesmithError
from tunesmith.progress import Reporter
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_metrics

SRC = str(Path(tunesmith.__file__).parents[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two workers under torchrun made of team_work.py, after one alone had written half a run."""
    folder = tmp_path_factory.mktemp("team")
    team_work.learn(folder / "whole", None, stop_after=3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SRC}
    done = subprocess.run(
        [*command, team_work.__file__, str(folder)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return load_file(folder / "0.safetensors")


def test_two_workers_have_the_gradient_the_loss_and_the_metrics_of_one(found):
    for case, alone in team_work.gradients().items():
        team = {name.removeprefix(f"{case}/"): t for name, t in found.items() if name.startswith(f"{case}/")}
        assert team.keys() == alone.keys(), case
        numbers = [name for name in alone if name.startswith(("total", "metric", "held out"))]
        for name in numbers:
            assert float(team.pop(name)) == pytest.approx(float(alone.pop(name)), rel=1e-6, abs=1e-12), (case, name)
        assert worst_error({n: t.detach() for n, t in alone.items()}, team) < 1e-6, case


def test_every_worker_goes_on_with_the_same_bytes(folder, found):
    other = load_file(folder / "1.safetensors")
    assert other.keys() == found.keys()
    assert all(torch.equal(found[name], other[name]) for name in found)


def test_what_workers_tell_one_another(folder):
    assert json.loads((folder / "said.json").read_text()) == [[{"rank": 0}, {"rank": 1}], 0]


def test_a_checkpoint_goes_from_one_worker_to_two_and_from_two_to_one(folder, found, tmp_path):
    """Half a run by one, half by the other: the weights are those of a run by one alone."""
    expected = team_work.learn(tmp_path / "alone", None)
    to_two = {name.removeprefix("resumed/"): t for name, t in found.items() if name.startswith("resumed/")}
    to_one = team_work.learn(tmp_path / "to one", folder / "in parts")
    for name, tensor in expected.items():
        torch.testing.assert_close(to_two[name], tensor, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(to_one[name], tensor, rtol=1e-7, atol=1e-9)


def test_a_checkpoint_in_parts_holds_half_a_worker_no_pickle_and_is_refused_when_a_part_is_damaged(folder, tmp_path):
    step = folder / "in parts" / "step-3"
    parts = sorted(step.glob("shard-*.safetensors"))
    assert {p.name for p in step.iterdir()} == {"manifest.json", "random.safetensors", *(p.name for p in parts)}
    sizes = [sum(t.numel() for t in load_file(part).values()) for part in parts]
    assert len(sizes) == 2
    assert sizes[1] > 0.4 * sum(sizes)
    parts[1].write_bytes(parts[1].read_bytes()[:-4] + b"oops")
    with pytest.raises(AssertionError):  # load_newest finds none
        team_work.learn(tmp_path, folder / "in parts")


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_workers_divide_a_step_and_pay_once_each_for_what_is_shared(count, together):
    rows = [example([*range(3, 43), *range(5 + i, 15 + i), i % 3], 3, str(i)) for i in range(12)]
    whole = make_step(0, 1.0, rows, Layout(10_000, together=together))
    step = make_step(0, 1.0, rows, Layout(10_000, workers=count, together=together))
    assert (step.weight, step.example_ids, len(step.parts)) == (whole.weight, whole.example_ids, count)
    placed = [i for group in step.groups for chosen in group.examples for i in chosen]
    assert sorted(placed) == list(range(12))
    assert step.computed_tokens <= whole.computed_tokens + (count - 1) * 50
    for part in step.parts:
        for group in part:
            for chosen in group.examples:
                assert all(chosen[k + 1] == chosen[k] + 1 for k in range(0, len(chosen), together) if together == 2)
    shares = [sum(tree.tokens for group in part for tree in group.trees) for part in step.parts]
    assert max(shares) <= 40 + 2 * (whole.computed_tokens - 40) / count + 22 * together


def worker(rank, code, killed=False, **said):
    return SimpleNamespace(rank=rank, process=SimpleNamespace(returncode=code), killed=killed, said=said)


@pytest.mark.parametrize(
    ("ended", "error", "words"),
    [
        (
            [worker(0, 1, lost=True, message="another"), worker(1, -9)],
            TunesmithError,
            "worker 1 of 2 was killed by SIGKILL",
        ),
        ([worker(0, 1, lost=True, message="another"), worker(1, 1, message="no space")], TunesmithError, "^no space$"),
        ([worker(0, -9, killed=True), worker(1, 2, message="bad row")], InputError, "^bad row$"),
        ([worker(0, 3, message="refused", gate="plan"), worker(1, -9, killed=True)], RefusedError, "^refused$"),
        ([worker(0, 130, message="stopped"), worker(1, 130, message="stopped")], InterruptedRun, "^stopped$"),
        ([worker(0, -9, killed=True), worker(1, 1)], TunesmithError, "worker 1 of 2 failed"),
    ],
)
def test_the_cause_is_said_not_what_followed_from_it(ended, error, words):
    with pytest.raises(TunesmithError, match=words) as raised:
        workers._raise_first_error(ended, "tunesmith train ... --resume")
    assert type(raised.value) is error


@pytest.fixture
def recipe(tmp_path):
    """A tiny base, and more steps than a test has patience for."""
    train = {"max_steps": 3000, "batch_examples": 5, "lr": 1e-2, "save_every": 20, "eval_every": 0}
    runtime = {"workers": 2, "threads": 1, "memory_limit": "4GB"}
    return make_questions(tmp_path, longest=3, train=train, runtime=runtime)


def test_a_plan_is_of_as_many_workers_as_will_train(recipe):
    """Measured in them: what is shared is computed by each, and memory is one's."""
    settings = Recipe.load(recipe, ["train.max_steps=20", "runtime.price_per_hour=3600"])
    found = tunesmith.plan(settings)
    alone = tunesmith.plan(Recipe.load(recipe, ["train.max_steps=20", "runtime.workers=1"]))
    assert (found.estimate.workers, alone.estimate.workers) == (2, 1)
    assert (found.estimate.steps, found.estimate.tokens) == (alone.estimate.steps, alone.estimate.tokens)
    assert found.estimate.computed_tokens > alone.estimate.computed_tokens
    assert found.estimate.memory_limit == alone.estimate.memory_limit // 2 == 2_000_000_000
    assert "GB at most in each of 2 workers, " in found.sentence()
    assert "workers" not in alone.sentence()
    assert found.money(1) == 1


def test_a_worker_knows_which_command_it_is_a_part_of():
    code = f"from tunesmith.progress import relay; import os; relay('result', os.environ[{stopping.COMMAND!r}])"
    with stopping.part_of("run"):
        worker = workers._Worker.start(0, 2, [sys.executable, "-c", code], 0, Reporter())
    workers._watch([worker])
    assert worker.said == {"result": "run"}
    assert stopping.asked() == "train"


def test_a_killed_worker_ends_the_run_with_one_sentence_and_one_alone_resumes_it(recipe, tmp_path):
    """And a step is the recipe's whatever the number of workers: the run that was one first is the same run."""
    run = Run(tmp_path / "run")
    command = [sys.executable, "-m", "tunesmith.cli", "train", str(recipe), "--run", str(run.folder), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SRC}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while len(read_metrics(run)) < 25:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    out, said = started.communicate(timeout=60)
    assert started.returncode == 1
    assert out == ""
    last = said.strip().splitlines()[-1]
    assert last.startswith("tunesmith: worker 1 of 2 was killed by SIGKILL")
    assert last.endswith(f"continue with `tunesmith train {run.recipe} --run {run.folder} --resume`")
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)

    steps = read_metrics(run)[-1]["step"] // 20 * 20 + 5
    shorter = Recipe.load(run.recipe, ["runtime.workers=1"])
    for place, resume in ((run.folder, True), (tmp_path / "alone", False)):
        with stopped_after(steps), pytest.raises(InterruptedRun):
            tunesmith.train(shorter, place, resume=resume)
    team, alone = read_metrics(run), read_metrics(Run(tmp_path / "alone"))
    assert [row["step"] for row in team] == [row["step"] for row in alone] == list(range(1, steps + 1))
    for ours, theirs in zip(team, alone, strict=True):
        assert (ours["examples"], ours["tokens"]) == (theirs["examples"], theirs["tokens"])
    assert [row["loss"] for row in team[:10]] == pytest.approx([row["loss"] for row in alone[:10]], rel=1e-5)
    assert not (tmp_path / "base" / "adapter").exists()
