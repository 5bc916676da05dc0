"""What each row costs the weights as they are: a forward pass, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tunesmith.data.batches import Layout, make_step
from tunesmith.train.forward import Body, run_prefix, run_tree
from tunesmith.types import TokenizedExample


def row_losses(body: Body, examples: Sequence[TokenizedExample], layout: Layout) -> npt.NDArray[np.float64]:
    """The mean negative log-likelihood of each example's supervised tokens; each must have some. [examples]"""
    step = make_step(0, 0.0, examples, layout)
    losses = np.empty(len(examples))
    training = body.model.training
    body.model.eval()  # no dropout
    try:
        with torch.no_grad(), body.steady():
            for group in step.groups:
                cache = None if group.prefix is None else run_prefix(body, group.prefix)
                for tree, chosen in zip(group.trees, group.examples, strict=True):
                    batch = run_tree(body, tree, [examples[i] for i in chosen], cache)
                    losses[list(chosen)] = batch.sum_by_sequence(-batch.scores.logprobs()).cpu().numpy()
    finally:
        body.model.train(training)
    return losses / [float(example.weights.sum()) for example in examples]
