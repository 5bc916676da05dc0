import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from decoders import example, make_decoder, make_rows
from tunesmith.data.batches import Layout, StepPlan, make_step
from tunesmith.errors import TunesmithError
from tunesmith.models.lora import add_new_adapter, wrap
from tunesmith.recipe import Adapter, Train
from tunesmith.train.bodies import make_body
from tunesmith.train.checkpoint import load_newest, save_checkpoint
from tunesmith.train.forward import ModuleBody
from tunesmith.train.loop import Hooks, evaluate, train
from tunesmith.train.losses import LossOutput, sft
from tunesmith.tree.body import prepare

ROWS = make_rows(prompt=70)


def make_run(name="llama", *, full=False, dropout=0.0):
    model = make_decoder(name, torch.float32)
    if full:
        prepare(model)
        return make_body(model), dict(model.named_parameters())
    lora = wrap(model)
    add_new_adapter(lora, "tuned", Adapter(rank=4, dropout=dropout), seed=0)
    lora.use("tuned")
    prepare(model)
    model.train(dropout > 0)
    return make_body(model, lora, "tuned"), dict(lora.parameters("tuned"))


def plan(steps=8, batch=4, **how):
    return StepPlan(ROWS, batch, steps, 0, True, Layout(**{"token_budget": 100, **how}))


def run(made, steps, **how):
    body, parameters = made
    rows, evals = [], []
    hooks = how.pop("hooks", Hooks())
    hooks = dataclasses.replace(hooks, on_step=rows.append, on_eval=evals.append)
    settings = how.pop("settings", Train())
    result = train(body, parameters, steps, how.pop("loss", sft), settings, lr=how.pop("lr", 1e-2), hooks=hooks, **how)
    return result, rows, evals


def held_out():
    return make_step(0, 0.0, ROWS[:4], Layout(60))


def test_metrics_of_a_step():
    steps = plan()
    _, rows, _ = run(make_run(), steps)
    assert [row.step for row in rows] == list(range(1, 9))
    for row, step in zip(rows, steps, strict=True):
        assert (row.examples, row.tokens, row.computed_tokens) == (
            len(step.examples),
            step.tokens,
            step.computed_tokens,
        )
        assert row.supervised_tokens == sum(int((e.weights > 0).sum()) for e in step.examples)
        assert 0 <= row.measures["token_accuracy"] <= 1
        assert row.peak_memory_bytes > 10**7
        assert row.seconds > 0
        assert row.grad_norm > 0
    assert rows[-1].loss < rows[0].loss


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_training_is_that_of_plain_torch(full):
    """The same rows, one at a time, through ordinary autograd and torch's own AdamW and clipping."""
    settings = Train(schedule="constant", warmup_ratio=0.0, max_grad_norm=1.0)
    steps = plan(steps=5)
    _, rows, _ = run(make_run(full=full), steps, settings=settings)
    body, parameters = make_run(full=full)
    model = body.model
    model.set_attn_implementation("eager")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    for step, row in zip(steps, rows, strict=True):
        optimizer.zero_grad()
        total = torch.zeros(())
        for e in step.examples:
            ids = torch.as_tensor(e.input_ids, dtype=torch.long)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total = total + (F.cross_entropy(logits, ids[1:], reduction="none") * torch.as_tensor(e.weights[1:])).sum()
        loss = total / sum(e.weights.sum() for e in step.examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        assert row.loss == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_interrupted_and_resumed_is_uninterrupted_to_the_byte(tmp_path, dropout):
    steps = plan(share=not dropout)
    torch.manual_seed(5)
    whole, rows, evals = run(make_run(dropout=dropout), steps, held_out=held_out(), eval_every=3)

    seen = []
    hooks = Hooks(
        on_checkpoint=lambda s: save_checkpoint(tmp_path, s), should_stop=lambda: len(seen.append(0) or seen) == 5
    )
    torch.manual_seed(5)
    first, early, _ = run(make_run(dropout=dropout), steps, held_out=held_out(), eval_every=3, hooks=hooks)
    assert not first.finished
    torch.manual_seed(99)
    resumed, late, late_evals = run(
        make_run(dropout=dropout), steps, held_out=held_out(), eval_every=3, resume=load_newest(tmp_path)
    )
    assert [r.loss for r in rows] == [r.loss for r in early + late]
    assert [e.held_out_loss for e in evals][1:] == [e.held_out_loss for e in late_evals]
    for part in ("parameters", "optimizer"):
        before, after = getattr(whole.state, part), getattr(resumed.state, part)
        assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    assert resumed.progress == whole.progress


def spoil(at, times=1):
    """A loss that is not a number on `times` steps from `at` on."""
    calls = []

    def loss(batch):
        calls.append(0)
        output = sft(batch)
        return LossOutput(output.total * math.nan, output.metrics) if at < len(calls) <= at + times else output

    return loss


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    made = make_run()
    before = {}
    result, rows, _ = run(made, plan(token_budget=10_000), loss=spoil(2))
    assert [row.skipped for row in rows] == [False, False, True] + [False] * 5
    assert result.progress.skipped == 1
    assert all(torch.isfinite(t).all() for t in result.state.parameters.values())
    assert not before


def test_several_in_a_row_stop_the_run_and_name_the_rows():
    with pytest.raises(TunesmithError, match=r"3 steps in a row .* on line of .*; lower train.lr"):
        run(make_run(), plan(token_budget=10_000), loss=spoil(1, 3), name_row=lambda i: f"line of {i}")


def test_patience_stops_a_run_and_the_best_is_saved(tmp_path):
    hooks = Hooks(on_checkpoint=lambda s: save_checkpoint(tmp_path, s, keep=1))
    settings = Train(patience=2, schedule="constant", warmup_ratio=0.0)
    other = make_step(0, 0.0, [example([9, 8, 7, 6, 5, 4, 3], 6)], Layout(60))
    result, rows, evals = run(
        make_run(), plan(60), held_out=other, eval_every=1, hooks=hooks, settings=settings, lr=0.3
    )
    assert result.stopped_early
    assert len(rows) < 60
    best = min(evals, key=lambda e: e.held_out_loss)
    assert result.progress.best_step == best.step == result.progress.step - 2
    assert (tmp_path / f"step-{best.step}").exists()


def test_evaluation_drops_nothing_out():
    body, parameters = make_run(dropout=0.5)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.3)
    step = make_step(0, 0.0, ROWS[:4], Layout(1000, share=False))
    first, second = (evaluate(body, step, sft, 0).held_out_loss for _ in range(2))
    assert first == second
    assert body.model.training


def test_evaluation_is_the_loss_on_the_held_out_rows():
    body, parameters = make_run()
    result, _, evals = run((body, parameters), plan(2), held_out=held_out(), lr=1e-9)
    with torch.no_grad():
        total = nll = correct = 0.0
        for row in ROWS[:4]:
            body.model.set_attn_implementation("eager")
            logits = body.model(input_ids=torch.as_tensor(row.input_ids[None], dtype=torch.long)).logits[0, :-1]
            target, weight = torch.as_tensor(row.input_ids[1:], dtype=torch.long), torch.as_tensor(row.weights[1:])
            nll += float((F.cross_entropy(logits, target, reduction="none") * weight).sum())
            correct += float(((logits.argmax(-1) == target) * weight).sum())
            total += float(weight.sum())
    assert evals[-1].held_out_loss == pytest.approx(nll / total, rel=1e-4)
    assert evals[-1].measures["token_accuracy"] == pytest.approx(correct / total)
    assert result.progress.best_step == 2


def test_a_per_sequence_loss_sees_each_sequence_whole():
    """The seam for preference losses: sums over a sequence's own tokens, whatever is shared and however it is cut."""
    body, parameters = make_run()

    def squared(batch):
        return LossOutput(batch.sum_by_sequence(batch.scores.logprobs()).square().sum())

    def gradient(layout):
        step = make_step(0, 1.0, ROWS, layout)
        from tunesmith.train.gradient import accumulate

        total, _ = accumulate(body, step, squared)
        grads = torch.cat([p.grad.flatten() for p in parameters.values()])
        for parameter in parameters.values():
            parameter.grad = None
        return total, grads

    expected, wanted = gradient(Layout(1, share=False, pack=False))
    for layout in (Layout(1000), Layout(100), Layout(60)):
        total, got = gradient(layout)
        assert total == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_any_body_will_do():
    body, parameters = make_run("gpt2")
    assert isinstance(body, ModuleBody)
    _, rows, _ = run((body, parameters), plan(4))
    assert rows[-1].loss < rows[0].loss


def test_the_score_says_which_evaluation_was_best():
    scores = iter([0.5, 0.9, 0.9, 0.2])
    hooks = Hooks(score=lambda: next(scores))
    settings = Train(schedule="constant", warmup_ratio=0.0)
    result, _, evals = run(
        make_run(), plan(8), held_out=held_out(), eval_every=2, hooks=hooks, settings=settings, lr=1e-3
    )
    assert [each.score for each in evals] == [0.5, 0.9, 0.9, 0.2]
    by_loss = {each.step: each.held_out_loss for each in evals}
    assert result.progress.best_step == min((4, 6), key=by_loss.__getitem__)  # equal scores: the lower loss
    assert result.progress.best_score == 0.9
