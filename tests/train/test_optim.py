import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from tunesmith.train.optim import adamw, grad_norm, load_state_tensors, lr_at, scale_grads, set_lr, state_tensors


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_schedules_are_transformers_ones_from_the_end_of_the_warm_up(schedule, warmup):
    steps = 50
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    kind = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(kind, optimizer, math.ceil(warmup * steps), steps)
    for step in range(steps):
        if step >= math.ceil(warmup * steps):
            assert lr_at(step, steps, 0.5, schedule, warmup) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_every_step_learns():
    for schedule in ("cosine", "linear", "constant"):
        for steps in (1, 2, 7):
            for warmup in (0.0, 0.03, 1.0):
                assert all(0 < lr_at(i, steps, 1.0, schedule, warmup) <= 1 for i in range(steps))


def test_clipping_is_torch_s():
    torch.manual_seed(0)
    mine, theirs = ([nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4))] for _ in range(2))
    for a, b in zip(mine, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    norm = grad_norm(mine)
    scale_grads(mine, 0.5 / norm)
    assert norm == pytest.approx(expected.item())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_vectors_and_state_survives_a_round_trip():
    def make():
        return {"w": nn.Parameter(torch.ones(2, 2)), "bias": nn.Parameter(torch.ones(2))}

    def update(parameters, optimizer):
        set_lr(optimizer, 0.1)
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()

    how = {"betas": (0.9, 0.99), "eps": 1.0, "weight_decay": 0.5}
    one, two = make(), make()
    first, second = adamw(one, **how), adamw(two, **how)
    update(one, first)
    assert one["bias"][0] > 0.99 > 0.96 > one["w"][0, 0]
    with torch.no_grad():
        for name in one:
            two[name].copy_(one[name])
    load_state_tensors(second, two, state_tensors(first, one))
    update(one, first)
    update(two, second)
    assert all(torch.equal(one[name], two[name]) for name in one)
