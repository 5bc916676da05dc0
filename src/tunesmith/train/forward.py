"""From a token tree to the scores a loss is made of: the model's body, then its head on supervised rows only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.models.memory import trim_heap
from tunesmith.tree.attention import PrefixCache, TreeContext
from tunesmith.tree.body import run_body
from tunesmith.tree.heads import Entries, Head, Scores, head_of
from tunesmith.tree.layout import TokenTree
from tunesmith.types import TokenizedExample

T = TypeVar("T")


class Body(Protocol):
    """A decoder without its head, over a tree. Differentiable in its parameters and in the prefix's keys and values.

    Several threads may call it at once. `parameters` are what a gradient is wanted of.
    """

    model: PreTrainedModel
    device: torch.device
    sharded: bool  # each worker holds a part of the weights, so all make the same passes

    @property
    def parameters(self) -> Sequence[nn.Parameter]: ...

    @property
    def head(self) -> Head: ...

    def __call__(
        self, tree: TokenTree, rows: Tensor, prefix: PrefixCache | None = None, *, record: bool = False
    ) -> tuple[Tensor, PrefixCache | None]:
        """Hidden states of `rows` [rows, hidden], and with `record` the tree's own keys and values."""
        ...

    def compute(self, work: Callable[[], T]) -> T:
        """Do `work`, which runs the body and its head, with their weights in place."""
        ...

    def rest(self) -> None:
        """Give back memory that is kept for the next pass."""
        ...

    def unpack(self) -> None:
        """Give back copies of the weights as well: passes become slower."""
        ...


class ModuleBody:
    """Any prepared model, through its own modules."""

    sharded = False

    def __init__(self, model: PreTrainedModel, parameters: Sequence[nn.Parameter] = ()) -> None:
        self.model, self.device, self.parameters = model, model.device, parameters

    @property
    def head(self) -> Head:
        return head_of(self.model)

    def __call__(
        self, tree: TokenTree, rows: Tensor, prefix: PrefixCache | None = None, *, record: bool = False
    ) -> tuple[Tensor, PrefixCache | None]:
        context = TreeContext(tree, prefix=prefix, record=record)
        ids = torch.as_tensor(tree.input_ids, device=self.device)
        positions = torch.as_tensor(tree.position_ids, device=self.device)
        hidden = run_body(self.model, ids, positions, context)
        return hidden.index_select(0, rows), context.recorded

    def compute(self, work: Callable[[], T]) -> T:
        return work()

    def rest(self) -> None:
        trim_heap()

    def unpack(self) -> None:
        self.rest()


@dataclass(frozen=True)
class Batch:
    """What a loss is given: a micro-batch's scores, and which sequence each belongs to."""

    scores: Scores
    weights: Tensor  # [entries] summed over the sequences that share an entry
    tree: TokenTree
    examples: Sequence[TokenizedExample]  # what `tree.links.sequence` counts
    device: torch.device

    def sum_by_sequence(self, by_entry: Tensor) -> Tensor:
        """[entries] -> [sequences]: each sequence's weighted sum over its own supervised tokens."""
        links = self.tree.links
        sequence, entry, weight = (
            torch.as_tensor(a, device=self.device) for a in (links.sequence, links.entry, links.weight)
        )
        out = by_entry.new_zeros(self.tree.sequences)
        return out.index_add(0, sequence, by_entry[entry] * weight.to(by_entry.dtype))

    def mean_by_sequence(self, by_entry: Tensor) -> Tensor:
        """[entries] -> [sequences]: the weighted mean over each sequence's own supervised tokens."""
        return self.sum_by_sequence(by_entry) / self.sum_by_sequence(torch.ones_like(by_entry))

    def column(self, name: str) -> Tensor:
        """What was computed of each sequence before training, one after the other: [sequences] or [supervised, k]."""
        values = np.concatenate([np.atleast_1d(each.columns[name]) for each in self.examples])
        return torch.as_tensor(values, device=self.device)

    def supervised(self) -> tuple[Tensor, Tensor]:
        """[supervised] the entry and the weight of each sequence's supervised tokens, one sequence after the other."""
        links = self.tree.links
        order = np.lexsort((links.token, links.sequence))
        return (
            torch.as_tensor(links.entry[order], device=self.device),
            torch.as_tensor(links.weight[order], device=self.device),
        )


def run_prefix(body: Body, tree: TokenTree) -> PrefixCache:
    """The keys and values of a prefix, on the graph of what computed them."""
    _, cache = body(tree, torch.empty(0, dtype=torch.long, device=body.device), record=True)
    assert cache is not None
    return cache


def run_tree(
    body: Body, tree: TokenTree, examples: Sequence[TokenizedExample], prefix: PrefixCache | None = None
) -> Batch:
    """One micro-batch, scored lazily."""
    rows, row_of_entry = np.unique(tree.rows, return_inverse=True)
    hidden, _ = body(tree, torch.as_tensor(rows, device=body.device), prefix)
    entries = Entries(
        torch.as_tensor(row_of_entry, device=body.device), torch.as_tensor(tree.targets, device=body.device)
    )
    weights = torch.as_tensor(tree.weights, device=body.device)
    return Batch(Scores(hidden, body.head, entries), weights, tree, examples, body.device)
