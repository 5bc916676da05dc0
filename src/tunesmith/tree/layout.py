"""The token tree: sequences that begin alike, laid out so that every distinct token is written once.

    A = S S S u u a a e    B = S S S v v b e        S = shared, u/v = user, a/b = answer, e = its end

    index        0  1  2   3 4 5 6   7  8  9
    token        S  S  S   u u a a   v  v  b
    position     0  1  2   3 4 5 6   3  4  5        depth in the trie
    subtree_end  10 10 10  7 7 7 7   10 10 10       one past the last token that may look back at this one

The last token of an answer is only ever a target: what follows the last token whose output is wanted is not computed.
Token q may look at token k exactly when `k <= q < subtree_end[k]`. Causal attention never shows a prefix what follows,
so its activations are the same in every sequence and its gradient is the sum over them: nothing is approximated.
Plain packing is the tree in which nothing is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunesmith.errors import InputError
from tunesmith.types import TokenizedExample

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Links:
    """Which entry of the tree holds each supervised token of each sequence: what a per-sequence loss sums over."""

    sequence: Ints  # [supervised] index into the examples the tree was built from
    token: Ints  # [supervised] the target's index in its sequence
    entry: Ints  # [supervised] index into the tree's rows, targets and weights
    weight: Floats  # [supervised] the sequence's own weight for that token


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A micro-batch, depth first. Every token also sees `prefix` tokens computed elsewhere (`PrefixCache`)."""

    input_ids: Ints  # [tokens]
    position_ids: Ints  # [tokens] depth in the trie, the prefix counted
    subtree_end: Ints  # [tokens]
    rows: Ints  # [entries] the token whose hidden state predicts the target; ascending
    targets: Ints  # [entries] token ids
    weights: Floats  # [entries] summed over the sequences that share the entry
    links: Links
    sequences: int
    prefix: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens the model computes."""
        return len(self.input_ids)


def inputs(example: TokenizedExample) -> npt.NDArray[np.int32]:
    """The tokens the model has to read: those before the last supervised one; all of them where none is."""
    supervised = np.flatnonzero(example.weights)
    return example.input_ids[: supervised[-1]] if len(supervised) else example.input_ids


def sort_order(examples: Sequence[TokenizedExample]) -> list[int]:
    """Indices that sort the sequences by their inputs, so that those which begin alike are neighbours. Stable."""
    return sorted(range(len(examples)), key=lambda i: inputs(examples[i]).astype(">u4").tobytes())


def shared_lengths(examples: Sequence[TokenizedExample], order: Sequence[int]) -> Ints:
    """For each sequence in `order`, how many of its inputs it shares with the one before it (0 for the first)."""
    shared = np.zeros(len(order), dtype=np.int64)
    for i in range(1, len(order)):
        before, here = inputs(examples[order[i - 1]]), inputs(examples[order[i]])
        length = min(len(before), len(here))
        differs = np.flatnonzero(before[:length] != here[:length])
        shared[i] = differs[0] if len(differs) else length
    return shared


def build_tree(examples: Sequence[TokenizedExample], *, share: bool = True, prefix: int = 0) -> TokenTree:
    """The trie of the sequences, in time linear in their tokens. Raises InputError for a group or a row with no token.

    share   False lays every sequence out as its own document.
    prefix  leading tokens, common to all sequences, that are computed elsewhere; no supervised token may stand in
            them or be predicted by them.
    """
    if not examples:
        raise InputError("a group of sequences is empty; give it at least one row")
    for example in examples:
        if not len(example.input_ids):
            raise InputError(f"the row with id {example.example_id} has no token; leave it out")
    order = sort_order(examples) if share else list(range(len(examples)))
    shared = shared_lengths(examples, order) if share else np.zeros(len(order), dtype=np.int64)
    if len(order) > 1 and prefix:
        assert shared[1:].min() >= prefix, "the sequences do not all share the prefix"
    shared[0] = prefix
    layout = _Layout(prefix)
    for here, common in zip(order, shared.tolist(), strict=True):
        layout.add(here, examples[here], common)
    return layout.finish(len(examples))


class _Layout:
    """Grows a tree by one sequence at a time, in sorted order."""

    def __init__(self, prefix: int) -> None:
        self.prefix, self.size = prefix, 0
        self.path: Ints = np.empty(0, dtype=np.int64)  # index in the tree of each token of the last sequence
        self.ids: list[Ints] = []
        self.positions: list[Ints] = []
        self.closed: list[tuple[Ints, int]] = []  # tokens, and the index at which their subtree ends
        self.links: list[tuple[Ints, Ints, Ints, Ints, Floats]] = []  # sequence, token, row, target, weight

    def add(self, sequence: int, example: TokenizedExample, shared: int) -> None:
        read = inputs(example)
        keep, length = shared - self.prefix, len(read)
        self.closed.append((self.path[keep:], self.size))
        self.path = np.concatenate((self.path[:keep], np.arange(self.size, self.size + length - shared)))
        self.size += length - shared
        self.ids.append(read[shared:].astype(np.int64))
        self.positions.append(np.arange(shared, length))
        token = np.flatnonzero(example.weights)
        if len(token):
            assert token[0] > self.prefix, "a supervised token is predicted inside the shared prefix"
            row = self.path[token - 1 - self.prefix]
            target = example.input_ids[token].astype(np.int64)
            self.links.append((np.full(len(token), sequence), token, row, target, example.weights[token]))

    def finish(self, sequences: int) -> TokenTree:
        self.closed.append((self.path, self.size))
        subtree_end = np.empty(self.size, dtype=np.int64)
        for tokens, end in self.closed:
            subtree_end[tokens] = end
        empty = (np.empty(0, dtype=np.int64),) * 4 + (np.empty(0, dtype=np.float32),)
        sequence, token, row, target, weight = (np.concatenate(c) for c in zip(*(self.links or [empty]), strict=True))
        # An entry is a distinct (row, target): sequences that agree on both share it, and their weights add up.
        entries, entry = np.unique(row << 32 | target, return_inverse=True)
        return TokenTree(
            input_ids=np.concatenate(self.ids),
            position_ids=np.concatenate(self.positions),
            subtree_end=subtree_end,
            rows=entries >> 32,
            targets=entries & 0xFFFFFFFF,
            weights=np.bincount(entry, weights=weight, minlength=len(entries)).astype(np.float32),
            links=Links(sequence, token, entry, weight.astype(np.float32)),
            sequences=sequences,
            prefix=self.prefix,
        )
