"""Whole models over a tree against the same model row by row: the loss, and every gradient."""

import pytest
import torch

from decoders import DECODERS, example, gradients, make_decoder, make_rows, one_by_one, worst_error
from tunesmith.data.batches import Layout, make_step
from tunesmith.train.forward import ModuleBody
from tunesmith.train.gradient import accumulate
from tunesmith.train.losses import sft
from tunesmith.tree.body import prepare

ROWS = {
    "shared": make_rows(),
    "alone": [example([5, 9, 11, 8], 2)],
    "nothing shared": [example([5, 9, 11, 8], 2), example([6, 9, 11], 1)],
    "chain": [example(list(range(5, 5 + n)), 2, str(n)) for n in (4, 8, 12, 16)],
    "single-token answers": [example([5, 6, 7, n], 1, str(n)) for n in (8, 9, 9)],
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["64", "32"])
def test_a_tree_gives_the_loss_and_gradients_of_its_rows(name, dtype, tolerance):
    model = make_decoder(name, dtype)
    assert prepare(model).share
    parameters, body = dict(model.named_parameters()), ModuleBody(model)
    for rows in ROWS.values():
        expected = one_by_one(model, rows)
        expected.backward()
        wanted = gradients(parameters)
        for layout in (Layout(1000), Layout(1000, share=False), Layout(16)):
            step = make_step(0, 1.0, rows, layout)
            total, _ = accumulate(body, step, sft)
            assert total == pytest.approx(expected.item(), rel=tolerance)
            got = {key: grad * step.weight for key, grad in gradients(parameters).items()}
            assert worst_error(wanted, got) < tolerance
