"""Distillation: the divergence by ordinary mathematics, however a step is cut; columns of the right tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from decoders import VOCABULARY, example, gradients, make_decoder, make_rows, worst_error
from tunesmith.data.batches import Layout, make_step
from tunesmith.models.lora import add_new_adapter, wrap
from tunesmith.recipe import Adapter
from tunesmith.train.annotate import likeliest, load_columns, save_columns, with_columns
from tunesmith.train.bodies import make_body
from tunesmith.train.loop import accumulate
from tunesmith.train.losses import TEACHER_IDS, TEACHER_LOGPROBS, distillation
from tunesmith.tree.body import prepare

LAYOUTS = [Layout(10_000), Layout(24), Layout(10_000, lanes=2), Layout(10_000, share=False)]


def make_run(name="llama"):
    model = make_decoder(name, torch.float64)
    lora = wrap(model)
    add_new_adapter(lora, "a", Adapter(rank=3), seed=0)
    for _, parameter in lora.parameters("a"):
        parameter.data = parameter.data.double()
    lora.use("a")
    prepare(model)
    return model, make_body(model, lora, "a"), dict(lora.parameters("a"))


def distributions(model, row):
    """[supervised, vocabulary] log-probabilities, the row by itself, by the model's own forward."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.as_tensor(row.input_ids, dtype=torch.long)
    logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    model.set_attn_implementation(before)
    return logprobs[torch.as_tensor(np.flatnonzero(row.weights) - 1)]


def behind(prompt, row):
    """The row with a prompt before it."""
    ids, weights = [*prompt, *row.input_ids.tolist()], [0.0] * len(prompt) + row.weights.tolist()
    made = example(ids, 0, row.example_id)
    made.weights[:] = weights
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_columns_are_the_teachers_likeliest_tokens_behind_its_prompt(layout):
    model, body, _ = make_run()
    seen = [behind(range(3, 40), row) for row in make_rows()]
    told = []
    columns = likeliest(body, seen, layout, lambda done, of: told.append((done, of)), k=5, vocabulary=VOCABULARY - 9)
    assert told[-1] == (len(seen), len(seen))
    for row, ids, logprobs in zip(seen, columns[TEACHER_IDS], columns[TEACHER_LOGPROBS], strict=True):
        expected = distributions(model, row)[:, : VOCABULARY - 9].topk(5)
        assert ids.tolist() == expected.indices.tolist()
        assert logprobs == pytest.approx(expected.values.detach().numpy(), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # fused, and through the model's own modules
@pytest.mark.parametrize(("k", "share"), [(4, 1.0), (4, 0.3), (VOCABULARY, 1.0)])
def test_the_loss_is_the_divergence_over_the_likeliest_and_the_rest_however_a_step_is_cut(name, k, share):
    model, body, parameters = make_run(name)
    rows = make_rows()
    rows = with_columns(rows, likeliest(body, rows, LAYOUTS[0], lambda *_: None, k=k, vocabulary=VOCABULARY))
    torch.manual_seed(3)
    for parameter in parameters.values():
        parameter.data += torch.randn_like(parameter) * 0.1
    expected, kls = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        logq, weights = distributions(model, row), torch.as_tensor(row.weights[row.weights > 0])
        ids = torch.as_tensor(row.columns[TEACHER_IDS]).long()
        p = torch.as_tensor(row.columns[TEACHER_LOGPROBS]).double().exp()
        q = logq.exp().gather(1, ids)
        kl = (p * (p / q).log()).sum(1)
        if k < VOCABULARY:
            r, s = 1 - p.sum(1), 1 - q.sum(1)
            kl = kl + r * (r / s).log()
        nll = -logq.gather(1, torch.as_tensor(row.input_ids[row.weights > 0]).long()[:, None])[:, 0]
        expected = expected + (weights * (share * kl + (1 - share) * nll)).sum()
        kls += float((weights * kl.detach()).sum())
    total_weight = sum(float(row.weights.sum()) for row in rows)
    (expected / total_weight).backward()
    wanted = gradients(parameters)
    for layout in LAYOUTS:
        step = make_step(0, 1.0, rows, layout)
        total, metrics = accumulate(body, step, distillation(share))
        assert total == pytest.approx(expected.item(), rel=1e-4)
        assert metrics["kl"] == pytest.approx(kls, rel=1e-4)
        assert worst_error(wanted, gradients(parameters)) < 1e-4


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    _, body, parameters = make_run()
    rows = make_rows()
    rows = with_columns(rows, likeliest(body, rows, LAYOUTS[0], lambda *_: None, k=3, vocabulary=VOCABULARY))
    total, metrics = accumulate(body, make_step(0, 1.0, rows, LAYOUTS[1]), distillation(1.0))
    assert total == pytest.approx(0, abs=1e-4)
    assert max(float(g.abs().max()) for g in gradients(parameters).values()) < 1e-4
    assert math.isfinite(metrics["nll"])


def test_columns_of_other_answers_are_not_taken_for_these(tmp_path):
    columns = {TEACHER_IDS: [np.arange(6, dtype=np.int32).reshape(3, 2), np.arange(2, dtype=np.int32).reshape(1, 2)]}
    save_columns(tmp_path / "columns", columns, "these")
    again = load_columns(tmp_path / "columns", 2, "these")
    assert [each.tolist() for each in again[TEACHER_IDS]] == [each.tolist() for each in columns[TEACHER_IDS]]
    assert load_columns(tmp_path / "columns", 2, "others") is None
    assert load_columns(tmp_path / "columns", 3, "these") is None
