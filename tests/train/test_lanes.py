"""Micro-batches side by side: the same gradient, bit for bit the same every time, whoever is done first."""

import threading
from types import SimpleNamespace

import pytest
import torch

from decoders import gradients, make_decoder, make_rows, worst_error
from tunesmith.data import batches
from tunesmith.data.batches import Layout, StepPlan, make_step
from tunesmith.models.lora import add_new_adapter, wrap
from tunesmith.recipe import Adapter, Train
from tunesmith.train.bodies import make_body
from tunesmith.train.gradient import _MicroBatch, accumulate
from tunesmith.train.lanes import side_by_side
from tunesmith.train.loop import train
from tunesmith.train.losses import sft
from tunesmith.tree.body import prepare


@pytest.fixture(autouse=True)
def small_lanes(monkeypatch):
    monkeypatch.setattr(batches, "LANE_TOKENS", 8)
    monkeypatch.setattr(batches, "LANE_SLACK", 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # fused, and through the model's own modules
@pytest.mark.parametrize("prompt", [70, 3])  # a prefix computed once, and one that is computed in every lane
def test_lanes_give_the_same_gradient_every_time(name, prompt):
    model, rows = make_decoder(name), make_rows(prompt=prompt)
    lora = wrap(model)
    add_new_adapter(lora, "a", Adapter(rank=3), seed=0)
    for _, parameter in lora.parameters("a"):
        parameter.data = torch.randn_like(parameter, dtype=model.dtype) * 0.2
    lora.use("a")
    prepare(model)
    body, parameters = make_body(model, lora, "a"), dict(lora.parameters("a"))
    expected, _ = accumulate(body, make_step(0, 1.0, rows, Layout(1000)), sft)
    wanted = gradients(parameters)
    for lanes in (2, 3):
        step = make_step(0, 1.0, rows, Layout(1000, lanes=lanes))
        assert len(step.trees) >= lanes
        first = None
        for _ in range(4):
            total, metrics = accumulate(body, step, sft)
            got = gradients(parameters)
            assert total == pytest.approx(expected, rel=1e-10)
            assert worst_error(wanted, got) < 1e-9
            assert first is None or (total, metrics) == first[:2]
            assert first is None or all(torch.equal(first[2][key], got[key]) for key in got)
            first = (total, metrics, got)


def test_lanes_run_at_the_same_time_in_order_and_give_the_threads_back():
    before, meeting = torch.get_num_threads(), threading.Barrier(2, timeout=30)

    def job(i):
        meeting.wait()  # only two at once get past it
        return i, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        results = list(side_by_side([lambda i=i: job(i) for i in range(4)], 2))
    assert results == [(i, max(1, before // 2), False) for i in range(4)]
    assert torch.get_num_threads() == before


def test_what_a_lane_raises_is_raised():
    def bad():
        raise ZeroDivisionError("in a lane")

    with pytest.raises(ZeroDivisionError, match="in a lane"):
        list(side_by_side([bad, lambda: 1], 2))


@pytest.mark.parametrize("prompt", [70, 3])
def test_a_run_in_lanes_learns_what_a_run_without_learns(prompt):
    """The gradient's values are not enough: fused AdamW reads it as it lies in memory."""
    rows, ends = make_rows(prompt=prompt), []
    for lanes in (1, 2):
        model = make_decoder("llama", torch.float32)
        lora = wrap(model)
        add_new_adapter(lora, "a", Adapter(rank=3), seed=0)
        lora.use("a")
        prepare(model)
        parameters = dict(lora.parameters("a"))
        steps = StepPlan(rows, len(rows), 4, 0, False, Layout(1000, lanes=lanes))
        train(make_body(model, lora, "a"), parameters, steps, sft, Train(), lr=1e-2)
        assert all(p.grad.stride() == p.stride() for p in parameters.values())
        ends.append(parameters)
    for name, alone in ends[0].items():
        torch.testing.assert_close(ends[1][name], alone, rtol=1e-3, atol=1e-5)


def test_a_gradient_lies_in_memory_like_its_parameter():
    """Fused AdamW reads both as they lie: a transposed gradient would train with its numbers shuffled."""
    parameter, grad = torch.nn.Parameter(torch.zeros(6, 4)), torch.randn(4, 6).t()
    body = SimpleNamespace(parameters=[parameter])
    for times in (1, 2):
        _MicroBatch(body, None, None, (), sft, None, (grad,)).add_gradients()
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, times * grad)
