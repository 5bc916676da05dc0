"""A row's loss does not depend on its neighbours: neither on shared prefixes nor on how micro-batches are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from decoders import make_decoder, make_rows
from tunesmith.data.batches import Layout
from tunesmith.train.bodies import make_body
from tunesmith.train.row_losses import row_losses
from tunesmith.tree.body import prepare

ROWS = make_rows(prompt=70)


def one_by_one(model):
    losses = []
    for row in ROWS:
        ids = torch.as_tensor(row.input_ids.astype(np.int64))
        nll = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
        weights = torch.as_tensor(row.weights[1:])
        losses.append(float((nll * weights).sum() / weights.sum()))
    return losses


@pytest.mark.parametrize("layout", [Layout(10_000), Layout(100), Layout(60, share=False), Layout(300, lanes=2)])
def test_each_row_costs_what_it_costs_alone(layout):
    with torch.no_grad():
        alone = one_by_one(make_decoder("llama", torch.float32))
    model = make_decoder("llama", torch.float32)
    prepare(model)
    assert row_losses(make_body(model), ROWS, layout) == pytest.approx(alone, rel=1e-4)
    assert len(set(np.round(alone, 3))) > 1
