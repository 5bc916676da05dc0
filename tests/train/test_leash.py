"""The leash to the base: ordinary mathematics however a step is cut, and runs that keep near the base and resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_distillation import LAYOUTS, distributions, make_run
from torch.nn.functional import kl_div

from decoders import VOCABULARY, gradients, make_decoder, make_rows, worst_error
from small_jobs import make_job
from stopped import stopped_after
from tunesmith import train
from tunesmith.data.batches import make_step
from tunesmith.errors import InputError, InterruptedRun
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_metrics
from tunesmith.train import annotate
from tunesmith.train.annotate import base_likeliest, with_columns
from tunesmith.train.bodies import make_body
from tunesmith.train.gradient import accumulate
from tunesmith.train.losses import leashed, sft
from tunesmith.tree.body import prepare

BETA = 0.7


def make_full(name):
    model = make_decoder(name, torch.float64)
    prepare(model)
    model.requires_grad_(True)
    return model, make_body(model), dict(model.named_parameters())


@pytest.mark.parametrize("make", [make_run, make_full])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("k", [4, VOCABULARY])
def test_the_leash_is_the_divergence_from_the_base_however_a_step_is_cut(make, name, k, monkeypatch):
    """By torch's own KL over the whole vocabulary, and with k of it over those and the remainder as one more token."""
    monkeypatch.setattr(annotate, "LEASH_TOP_K", k)
    model, body, parameters = make(name)
    rows = make_rows()
    with torch.no_grad():
        before = [distributions(model, row) for row in rows]
    rows = with_columns(rows, base_likeliest(body, rows, LAYOUTS[1], lambda *_: None))
    torch.manual_seed(3)
    for parameter in parameters.values():
        parameter.data += torch.randn_like(parameter) * 0.1
    nll, kl = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, logp in zip(rows, before, strict=True):
        logq, weights = distributions(model, row), torch.as_tensor(row.weights[row.weights > 0]).double()
        targets = torch.as_tensor(row.input_ids[row.weights > 0]).long()
        nll = nll - (weights * logq.gather(1, targets[:, None])[:, 0]).sum()
        if k < VOCABULARY:
            ids = logp.topk(k).indices
            logp, logq = (torch.cat((each.gather(1, ids), rest(each, ids)), dim=1) for each in (logp, logq))
        kl = kl + (weights * kl_div(logq, logp, reduction="none", log_target=True).sum(1)).sum()
    assert kl > 0.1 * nll  # or the gradient would say nothing of it
    ((nll + BETA * kl) / sum(float(row.weights.sum()) for row in rows)).backward()
    wanted = gradients(parameters)
    for layout in LAYOUTS:
        total, metrics = accumulate(body, make_step(0, 1.0, rows, layout), leashed(sft, BETA))
        assert total == pytest.approx(float((nll + BETA * kl).detach()), rel=1e-5)
        assert metrics["nll"] == pytest.approx(float(nll.detach()), rel=1e-6)
        assert metrics["kl_to_base"] == pytest.approx(float(kl.detach()), rel=1e-4)
        assert worst_error(wanted, gradients(parameters)) < 1e-4


def rest(logprobs, ids):
    """[rows, 1]: the log-probability of all other tokens."""
    return logprobs.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    return make_job(tmp_path_factory.mktemp("leash") / "job", "full", max_steps=12)


def measured(run: Run, key: str) -> list[float]:
    return [row[key] for row in read_metrics(run) if key in row]


def test_every_weight_learns_near_the_base_and_a_resumed_run_ends_in_the_same_bytes(job: Path, tmp_path: Path) -> None:
    tight, loose = (Recipe.load(job, [f"objective.kl_to_base={beta}"]) for beta in (50.0, 1e-6))
    whole, free = train(tight, tmp_path / "whole"), train(loose, tmp_path / "free")
    kept, left = measured(whole, "kl_to_base"), measured(free, "kl_to_base")
    assert kept[0] == left[0] == pytest.approx(0, abs=1e-5)
    assert 0 < kept[-1] < 0.5 * left[-1]
    last = [row for row in read_metrics(whole) if "held_out_loss" in row][-1]
    assert last["held_out_loss"] == pytest.approx(last["held_out_nll"] + 50.0 * last["held_out_kl_to_base"])
    with stopped_after(3), pytest.raises(InterruptedRun):
        train(tight, tmp_path / "again")
    again = train(tight, tmp_path / "again", resume=True)
    assert (again.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["lora", "dora"])  # fused, and through the model's own modules
def test_the_leash_of_a_continued_adapter_is_to_the_base_not_to_where_it_stood(
    job: Path, tmp_path: Path, kind: str
) -> None:
    adapter = f"adapter={{kind: {kind}, rank: 4}}"
    first = train(Recipe.load(job, [adapter, "train.lr=0.1"]), tmp_path / "first")
    more = [adapter, f"adapter.init_from={first.adapter}", "objective.kl_to_base=0.1", "train.max_steps=2"]
    assert measured(train(Recipe.load(job, more), tmp_path / "more"), "kl_to_base")[0] > 1e-3  # 1e-7 where it stood


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto", "compress"])
def test_an_objective_that_has_no_use_for_a_leash_says_why(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"data: {{train: rows.jsonl}}\nobjective: {{kind: {kind}, kl_to_base: 0.1}}\n")
    with pytest.raises(InputError, match=f"objective {kind} takes no kl_to_base: .*; leave it out"):
        Recipe.load(path)
