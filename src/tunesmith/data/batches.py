"""Which examples an optimiser step holds, and how they are laid out to be computed.

The recipe's order decides the first, alone: `epoch_order` is a pure function of its arguments, so step N is known
without running steps 1 to N-1 and a resumed run sees what the uninterrupted one would have. The planner decides the
second: micro-batches of at most `token_budget` tokens, none of which changes the gradient, because the loss is a sum
and the step's total weight is known before its first forward pass.

    one micro-batch      the step's tree, where it fits
    several              behind a common prefix that is computed once a step: forward, micro-batches (which leave their
                         gradients in its keys and values), backward

With several lanes the micro-batches are cut evenly, so that as many can run side by side (train/lanes.py). With several
workers the step's examples are first divided among them, neighbours in the tree together, so that each pays for a
prefix once; the step is the same step, of the same weight, whatever their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tunesmith.errors import InputError
from tunesmith.tree.layout import TokenTree, build_tree, inputs, shared_lengths, sort_order
from tunesmith.types import TokenizedExample

LANE_TOKENS = 96  # a micro-batch of fewer tokens is not cut for the sake of another lane
LANE_SLACK = 16  # tokens that may be computed twice to cut evenly
PREFIX_WORTH_KEEPING = 64  # computing a prefix apart costs a pass over the model's weights: about so many tokens


@dataclass(frozen=True, slots=True)
class Group:
    """Micro-batches behind one prefix, or, without a prefix, on their own."""

    prefix: TokenTree | None
    trees: tuple[TokenTree, ...]
    examples: tuple[tuple[int, ...], ...]  # for each tree, the step's examples it was built from, in its order


@dataclass(frozen=True, slots=True)
class Step:
    """All that one update of the weights is computed from."""

    index: int  # from 0, over the whole run
    epoch: float  # epochs completed once this step is done
    parts: tuple[tuple[Group, ...], ...]  # what each worker computes
    examples: tuple[TokenizedExample, ...]
    weight: float  # what the loss is divided by
    lanes: int = 1  # micro-batches of a group that may run at a time
    together: int = 1  # consecutive sequences that are one example

    @property
    def example_ids(self) -> tuple[str, ...]:
        return tuple(example.example_id for example in self.examples[:: self.together])

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for part in self.parts for group in part)

    @property
    def trees(self) -> tuple[TokenTree, ...]:
        return tuple(tree for group in self.groups for tree in group.trees)

    @property
    def tokens(self) -> int:
        """Every example in full."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def computed_tokens(self) -> int:
        """What the model really runs."""
        prefixes = sum(group.prefix.tokens for group in self.groups if group.prefix is not None)
        return prefixes + sum(tree.tokens for tree in self.trees)

    @property
    def supervised_tokens(self) -> int:
        return sum(int(np.count_nonzero(example.weights)) for example in self.examples)


@dataclass(frozen=True, slots=True)
class Layout:
    """How examples may be laid out. `share` False where branching is not exact; `pack` False where neighbours leak.

    `lanes` micro-batches may run at a time, and `token_budget` is for all of them together. So many consecutive
    sequences as `together` says are one example (a chosen and a rejected answer) and stay in one micro-batch. `workers`
    processes divide every step. Where the weights are `sharded` over them all make their passes in step with one
    another, and a prefix is computed in each micro-batch, not apart. `packed`: the frozen weights are packed for faster
    products. The gradient is the same in every layout but for the order of sums; only the same layout gives the same
    bytes.
    """

    token_budget: int
    share: bool = True
    pack: bool = True
    lanes: int = 1
    together: int = 1
    workers: int = 1
    sharded: bool = False
    packed: bool = False


@lru_cache(maxsize=2)  # a million rows take longer to shuffle than a small step to lay out
def epoch_order(n: int, epoch: int, seed: int, shuffle: bool) -> npt.NDArray[np.int64]:
    """The order in which epoch `epoch` (from 0) visits `n` examples: a pure function of its arguments."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n) if shuffle else np.arange(n)
    order.setflags(write=False)  # all callers are given the same one
    return order


def steps_per_epoch(n: int, batch_examples: int) -> int:
    """The last step of an epoch may be short; no step crosses into the next epoch."""
    return -(-n // batch_examples)


def count_steps(n: int, batch_examples: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimiser steps of a run; `max_steps` wins over `epochs`, and half an epoch is half its steps, at least one."""
    if max_steps is not None:
        return max_steps
    return max(1, round(epochs * steps_per_epoch(n, batch_examples)))


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run, each made when asked for: `plan[7]` needs nothing of the six before it."""

    examples: Sequence[TokenizedExample]
    batch_examples: int
    steps: int
    seed: int
    shuffle: bool
    layout: Layout

    def __post_init__(self) -> None:
        if not self.examples:
            raise InputError("there are no rows to train on; name a file that has some")
        assert len(self.examples) % self.layout.together == 0, "an example lacks one of its sequences"

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Step:
        if not 0 <= index < self.steps:
            raise IndexError(index)
        together = self.layout.together
        n = len(self.examples) // together
        epoch, within = divmod(index, steps_per_epoch(n, self.batch_examples))
        order = epoch_order(n, epoch, self.seed, self.shuffle)
        chosen = order[within * self.batch_examples : (within + 1) * self.batch_examples]
        done = min((within + 1) * self.batch_examples, n)
        sequences = [self.examples[together * i + k] for i in chosen for k in range(together)]
        return make_step(index, epoch + done / n, sequences, self.layout)

    def used(self) -> npt.NDArray[np.int64]:
        """Which sequences the run ever sees, by index, ascending: all of them, once an epoch is through."""
        together = self.layout.together
        order = epoch_order(len(self.examples) // together, 0, self.seed, self.shuffle)
        seen = np.sort(order[: self.steps * self.batch_examples])
        return (together * seen[:, None] + np.arange(together)).reshape(-1)

    def too_long(self) -> list[TokenizedExample]:
        """Examples longer than the budget: each is computed by itself, over the budget."""
        return [example for example in self.examples if len(inputs(example)) > self.layout.token_budget]


def make_step(index: int, epoch: float, examples: Sequence[TokenizedExample], layout: Layout) -> Step:
    """Lay the examples of one step out. Raises InputError, naming the rows, where there is nothing to learn from.

    A step weighs as much as its supervised tokens; where an example is several sequences, compared whole, it counts 1.
    """
    weight = float(sum(example.weights.sum(dtype=np.float64) for example in examples))
    if layout.together > 1:
        weight = len(examples) / layout.together
    if not weight > 0:
        names = ", ".join(example.example_id for example in examples[:3])
        raise InputError(f"a step holds no supervised token (rows {names}); leave such rows out")
    parts = tuple(_part(examples, chosen, layout) for chosen in divide(examples, layout))
    return Step(index, epoch, parts, tuple(examples), weight, layout.lanes, layout.together)


def divide(examples: Sequence[TokenizedExample], layout: Layout) -> list[list[int]]:
    """Which of the examples each worker takes, all of them once; about as many tokens to compute for each.

    Neighbours in the order of the tree stay together, for the tokens they share.
    """
    together, workers = layout.together, layout.workers
    if workers == 1:
        return [list(range(len(examples)))]
    firsts = sort_order(examples[::together]) if layout.share else range(len(examples) // together)
    order = [together * first + k for first in firsts for k in range(together)]
    sizes = np.array([len(inputs(examples[i])) for i in order])
    if layout.share:
        shared = shared_lengths(examples, order)
        sizes[1:] -= shared[1:]
        sizes[0] -= shared[1:].min(initial=sizes[0])  # what all begin with is computed by every worker
    by_example = sizes.reshape(-1, together).sum(1) + 1
    middle = by_example.cumsum() - by_example / 2
    worker = (middle * workers / by_example.sum()).astype(int)
    return [[i for k, i in enumerate(order) if worker[k // together] == each] for each in range(workers)]


def _part(examples: Sequence[TokenizedExample], chosen: Sequence[int], layout: Layout) -> tuple[Group, ...]:
    """One worker's micro-batches, over indices of the step's examples."""
    groups = plan_groups([examples[i] for i in chosen], layout)
    return tuple(
        replace(group, examples=tuple(tuple(chosen[i] for i in tree) for tree in group.examples)) for group in groups
    )


def plan_groups(examples: Sequence[TokenizedExample], layout: Layout) -> Iterator[Group]:
    """Micro-batches under the budget, in an order of their own, that together hold every example once."""
    if examples and layout.share and layout.pack:
        yield from _Planner(examples, layout).groups()
        return
    batch: list[int] = []
    for start in range(0, len(examples), layout.together):
        example = range(start, start + layout.together)
        size = sum(len(inputs(examples[j])) for j in (*batch, *example))
        if batch and (size > layout.token_budget or not layout.pack):
            yield _group(examples, batch, share=False)
            batch = []
        batch.extend(example)
    if batch:
        yield _group(examples, batch, share=False)


def _group(examples: Sequence[TokenizedExample], chosen: Sequence[int], *, share: bool) -> Group:
    tree = build_tree([examples[i] for i in chosen], share=share)
    return Group(None, (tree,), (tuple(chosen),))


class _Planner:
    """Cuts the sorted sequences of a step where they differ most. [i, j) below are ranges of the sorted order.

    Examples of several sequences are sorted by their first one and never cut.
    """

    def __init__(self, examples: Sequence[TokenizedExample], layout: Layout) -> None:
        self.examples, self.budget, self.lanes = examples, layout.token_budget // layout.lanes, layout.lanes
        self.together, self.sharded = layout.together, layout.sharded
        firsts = sort_order(examples[:: self.together])
        self.order = [self.together * first + k for first in firsts for k in range(self.together)]
        self.shared = shared_lengths(examples, self.order)
        self.lengths = np.array([len(inputs(examples[i])) for i in self.order])

    def groups(self) -> Iterator[Group]:
        return self._cut(0, len(self.order))

    def _tokens(self, i: int, j: int) -> int:
        """Distinct tokens of the sequences in [i, j)."""
        return int(self.lengths[i:j].sum() - self.shared[i + 1 : j].sum())

    def _cut(self, i: int, j: int) -> Iterator[Group]:
        tokens = self._tokens(i, j)
        if j - i == self.together or (tokens <= self.budget and self._parts(tokens) == 1):
            yield _group(self.examples, self.order[i:j], share=True)
            return
        # A sequence that the next one begins with adds no token: only the others are places to cut.
        cuts = i + 1 + np.flatnonzero(self.shared[i + 1 : j] < self.lengths[i : j - 1])
        inside, cuts = cuts[cuts % self.together > 0], cuts[cuts % self.together == 0]
        if not len(cuts):
            yield _group(self.examples, self.order[i:j], share=True)
            return
        lowest = int(self.shared[cuts].min())
        common = min(lowest, int(self.shared[inside].min(initial=lowest)))
        slack = LANE_SLACK if self.lanes > 1 else 0
        starts = [i, *cuts[self.shared[cuts] <= lowest + slack].tolist(), j]
        sizes = [self._tokens(a, b) - common for a, b in itertools.pairwise(starts)]
        room = max(1, self.budget - common)  # none where the prefix alone fills the budget: then one example at a time
        parts = self._parts(sum(sizes))
        fair = room if parts == 1 else min(room, -(-sum(sizes) // parts))
        ranges = list(itertools.pairwise(starts))
        again = {k for k, (a, b) in enumerate(ranges) if sizes[k] > fair and b - a > self.together}
        whole = [k for k in range(len(ranges)) if k not in again]
        bins = spread([sizes[k] for k in whole], parts, room)
        yield from self._close([[ranges[whole[k]] for k in chosen] for chosen in bins], common)
        for k in sorted(again):
            yield from self._cut(*ranges[k])

    def _parts(self, tokens: int) -> int:
        """How many lanes so many tokens are worth."""
        return max(1, min(self.lanes, tokens // LANE_TOKENS))

    def _close(self, bins: list[list[tuple[int, int]]], common: int) -> Iterator[Group]:
        """Bins of ranges that differ after `common` tokens, with that prefix computed once where it saves something."""
        if not bins:
            return
        members = [[k for a, b in ranges for k in self.order[a:b]] for ranges in bins]
        prefix = min(common, *(self._unsupervised(i) for chosen in members for i in chosen))
        if self.sharded or prefix * (len(bins) - 1) < PREFIX_WORTH_KEEPING:
            prefix = 0
        trees, used = [], []
        for chosen in members:
            longer = [i for i in chosen if len(inputs(self.examples[i])) > prefix]
            if longer:
                trees.append(build_tree([self.examples[i] for i in longer], prefix=prefix))
                used.append(tuple(longer))
        yield Group(self._head(members[0][0], prefix) if prefix else None, tuple(trees), tuple(used))

    def _head(self, i: int, prefix: int) -> TokenTree:
        """The first `prefix` tokens of an example, for their keys and values alone."""
        ids = self.examples[i].input_ids[:prefix]
        return build_tree([TokenizedExample(self.examples[i].example_id, ids, np.zeros(prefix, dtype=np.float32))])

    def _unsupervised(self, i: int) -> int:
        """How many leading tokens of an example predict nothing that counts."""
        supervised = np.flatnonzero(self.examples[i].weights)
        return int(supervised[0]) - 1 if len(supervised) else len(self.examples[i].input_ids)


def spread(sizes: Sequence[int], parts: int, room: int) -> list[list[int]]:
    """Indices of `sizes` in bins of about the same sum: the least multiple of `parts` that keeps each within `room`.

    The largest first, each into the emptiest bin (Graham 1969, "Bounds on multiprocessing timing anomalies"). One that
    is larger than the room has a bin to itself. Worked example: 129, 125, 96 and 53 in two: 129 + 53 and 125 + 96.
    """
    alone = [[index] for index, size in enumerate(sizes) if size > room]
    order = sorted((index for index, size in enumerate(sizes) if size <= room), key=lambda index: -sizes[index])
    count = parts * -(-sum(sizes[index] for index in order) // (room * parts))
    while True:
        bins, sums = [list[int]() for _ in range(count)], [0] * count
        for index in order:
            emptiest = sums.index(min(sums))
            bins[emptiest].append(index)
            sums[emptiest] += sizes[index]
        if max(sums, default=0) <= room:
            return [*alone, *(sorted(own) for own in bins if own)]
        count += parts
