"""The gradient of a step: forward and backward of its micro-batches, over lanes and over workers.

The loss returns a sum and the step knows its weight before the first forward, so that however the step is cut the
gradient is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.batches import Group, Step
from tunesmith.train import parallel
from tunesmith.train.forward import Body, run_prefix, run_tree
from tunesmith.train.lanes import side_by_side
from tunesmith.train.losses import Loss, LossOutput, SumLoss, Surveyed
from tunesmith.tree.attention import PrefixCache
from tunesmith.tree.layout import TokenTree, build_tree
from tunesmith.types import TokenizedExample


def accumulate(body: Body, step: Step, loss: Loss, *, backward: bool = True) -> tuple[float, dict[str, float]]:
    """The step's loss and metrics as sums; with `backward` the gradient of loss / weight is added to the parameters.

    A step laid out for several workers is computed by all of them: each its part, and each gets the sums.
    """
    if isinstance(loss, Surveyed):
        with torch.no_grad():
            _, found = accumulate(body, step, loss.survey, backward=False)
        loss = loss.given(means(found, step))
    total, metrics = 0.0, dict[str, float]()
    shared = len(step.parts) > 1
    part = step.parts[parallel.rank()] if shared else step.groups
    results = [each for group in part for each in _run_group(body, step, group, loss, backward)]
    for value, extra in results:
        total += value
        for key, amount in extra.items():
            metrics[key] = metrics.get(key, 0.0) + amount
    if not shared:
        return total, metrics
    if body.sharded:
        for _ in range(max(map(_passes, step.parts)) - _passes(part)):
            _pass_for_nothing(body, step, backward)
    if backward:
        parallel.add_up_gradients(body.parameters)
    return parallel.add_up(total, metrics)


def _passes(part: Sequence[Group]) -> int:
    return sum(len(tree.rows) > 0 for group in part for tree in group.trees)


def _pass_for_nothing(body: Body, step: Step, backward: bool) -> None:
    """A pass whose loss and gradient are zero, for the sake of the workers that have more of them to make."""
    ids = next(example.input_ids[:2] for example in step.examples if len(example.input_ids) > 1)
    examples = [TokenizedExample("", ids, np.array([0, 1], np.float32))]

    def nothing() -> Tensor:
        batch = run_tree(body, build_tree(examples), examples)
        return batch.scores.weighted_nll(torch.zeros_like(batch.weights))

    total = body.compute(nothing)
    if backward:
        total.backward()


def _run_group(
    body: Body, step: Step, group: Group, loss: SumLoss, backward: bool
) -> list[tuple[float, Mapping[str, float]]]:
    cache = None if group.prefix is None else run_prefix(body, group.prefix)
    chosen = [pair for pair in zip(group.trees, group.examples, strict=True) if len(pair[0].rows)]
    lanes = min(step.lanes, len(chosen))
    leaves = None if cache is None else cache.leaves()
    tasks = [_MicroBatch(body, step, *pair, loss, leaves) for pair in chosen]
    if lanes < 2 or not backward:
        results = list(side_by_side([partial(task.run, backward) for task in tasks], max(1, lanes)))
    else:
        results = []
        for task, result in zip(tasks, side_by_side([task.run_apart for task in tasks], lanes), strict=True):
            task.add_gradients()  # at once: it takes as much memory as the adapter
            results.append(result)
    if backward and cache is not None and leaves is not None:
        pairs = zip(cache.tensors(), leaves.tensors(), strict=True)
        reached = [(t, leaf.grad) for t, leaf in pairs if t.requires_grad and leaf.grad is not None]
        if reached:
            torch.autograd.backward([t for t, _ in reached], [g for _, g in reached])
    return results


@dataclass
class _MicroBatch:
    """One tree of a step, run in the caller's thread or in a lane. `leaves`: the prefix it stands behind."""

    body: Body
    step: Step
    tree: TokenTree
    chosen: tuple[int, ...]
    loss: SumLoss
    leaves: PrefixCache | None
    gradients: tuple[Tensor | None, ...] = ()

    def run(self, backward: bool) -> tuple[float, Mapping[str, float]]:
        """Loss and metrics; with `backward` the gradient is added to parameters and leaves."""
        output = self._output()
        if backward:
            (output.total / self.step.weight).backward()
        return float(output.total.detach()), output.metrics

    def run_apart(self) -> tuple[float, Mapping[str, float]]:
        """The same, with the gradient kept aside: lanes end in any order, and sums must not depend on it."""
        output = self._output()
        self.gradients = torch.autograd.grad(output.total / self.step.weight, self._wanted(), allow_unused=True)
        return float(output.total.detach()), output.metrics

    def add_gradients(self) -> None:
        for tensor, grad in zip(self._wanted(), self.gradients, strict=True):
            if grad is None:
                continue
            if tensor.grad is None:  # laid out in memory like its tensor: fused AdamW reads both as they lie
                tensor.grad = torch.empty_like(tensor).copy_(grad)
            else:
                tensor.grad.add_(grad)
        self.gradients = ()

    def _output(self) -> LossOutput:
        def scored() -> tuple[Tensor, Mapping[str, float]]:
            examples = [self.step.examples[i] for i in self.chosen]
            output = self.loss(run_tree(self.body, self.tree, examples, self.leaves))
            return output.total, output.metrics

        return LossOutput(*self.body.compute(scored))

    def _wanted(self) -> list[Tensor]:
        return [*self.body.parameters, *(self.leaves.tensors() if self.leaves is not None else ())]


def means(sums: Mapping[str, float], step: Step) -> dict[str, float]:
    return {name: value / step.weight for name, value in sums.items()}
