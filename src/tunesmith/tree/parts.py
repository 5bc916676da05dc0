"""Which rectangles of scores a tree needs: attention over the tree as a list of ordinary attentions to be merged.

A chain of tokens between two branching points is a segment. The queries of its whole subtree look at its keys, and
because they follow it depth first they are one contiguous range: one causal attention (query i sees key j when
`j <= i`, both counted from the segment's start) serves the segment and everything below it.

    A = S S S u u      segment  queries  keys        S S S u u v v      all the parts together:
    B = S S S v v      S        [0, 7)   [0, 3)                         S  x
                       u        [3, 5)   [3, 5)                         u  x x
                       v        [5, 7)   [5, 7)                         v  x   x
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunesmith.tree.layout import TokenTree

BUNDLE = 128  # neighbouring subtrees that fit in so many tokens are one masked part: fewer, larger products
BLOCK = 512  # queries to a part where a sliding window cuts through


@dataclass(frozen=True, slots=True)
class Part:
    """Queries [q0, q1) over keys [k0, k1); keys are counted with the prefix in front."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False  # query q0 + i sees key k0 + j only when j <= i
    bias: Tensor | None = None  # [q1 - q0, k1 - k0] float32: 0 where the query sees the key, else -inf; no row all -inf
    first: bool = False  # no earlier part held these queries


@dataclass(frozen=True, slots=True)
class Parts:
    """Together they cover every visible (query, key) pair exactly once."""

    parts: tuple[Part, ...]
    tokens: int
    keys: int
    keys_once: bool  # every key stands in exactly one part


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop), in a chain; their common subtree ends at `end`."""

    start: int
    stop: int
    end: int
    position: int  # of the token at start


def segments(tree: TokenTree) -> list[Segment]:
    """The tree's chains, depth first."""
    end = tree.subtree_end
    starts = [0, *(np.flatnonzero(end[1:] != end[:-1]) + 1).tolist()]
    stops = [*starts[1:], tree.tokens]
    return [Segment(a, b, int(end[a]), int(tree.position_ids[a])) for a, b in zip(starts, stops, strict=True)]


def plan_parts(tree: TokenTree, sliding_window: int | None = None) -> Parts:
    """The parts of a tree, for a layer that sees everything or one that sees `sliding_window` positions back."""
    keys = tree.prefix + tree.tokens
    if sliding_window is None or int(tree.position_ids.max()) < sliding_window:
        return Parts(tuple(_whole(tree)), tree.tokens, keys, keys_once=True)
    return Parts(tuple(_windowed(tree, sliding_window)), tree.tokens, keys, keys_once=False)


def _whole(tree: TokenTree) -> Iterator[Part]:
    chain, prefix, covered, i = segments(tree), tree.prefix, 0, 0
    if prefix:
        yield Part(0, tree.tokens, 0, prefix, first=True)
        covered = tree.tokens
    while i < len(chain):
        here, first = chain[i], chain[i].start >= covered
        j, end = i, here.start  # chain[i:j] are whole subtrees, ending at `end`
        while j < len(chain) and chain[j].end - here.start <= BUNDLE and (chain[j].start >= covered) == first:
            end = chain[j].end
            while j < len(chain) and chain[j].start < end:
                j += 1
        if j > i + 1:
            yield Part(
                here.start, end, prefix + here.start, prefix + end, bias=_own_bias(tree, here.start, end), first=first
            )
            i = j
        else:
            end = here.end
            yield Part(here.start, end, prefix + here.start, prefix + here.stop, causal=True, first=first)
            i += 1
        covered = max(covered, end)


def _own_bias(tree: TokenTree, start: int, stop: int) -> Tensor:
    query, end = np.arange(start, stop), tree.subtree_end[start:stop]
    return _bias((query[None] <= query[:, None]) & (query[:, None] < end[None]))


def _bias(seen: npt.NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf)))


def _windowed(tree: TokenTree, window: int) -> Iterator[Part]:
    """Segment by segment, and within it block by block, with only the keys that some query of the block can see."""
    biases: dict[tuple[int, int, int], Tensor] = {}
    path = [Segment(-tree.prefix, 0, tree.tokens, 0)] if tree.prefix else []
    for here in segments(tree):
        while path and path[-1].end <= here.start:
            path.pop()
        path.append(here)
        for above in reversed(path):
            yield from _pair(here, above, tree.prefix, window, biases)


def _pair(
    here: Segment, above: Segment, prefix: int, window: int, biases: dict[tuple[int, int, int], Tensor]
) -> Iterator[Part]:
    """The parts in which `here` looks at `above`, a segment on its own path (itself included)."""
    own, keys_end = here is above, above.position + above.stop - above.start
    last = here.position + here.stop - here.start
    if not own:
        last = min(last, keys_end - 1 + window)  # beyond that a query sees no key of `above`
    for q0 in range(here.position, last, BLOCK):
        q1 = min(q0 + BLOCK, last)
        k0, k1 = max(above.position, q0 - window + 1), min(keys_end, q1)
        shape = (q1 - q0, k1 - k0, q0 - k0)
        whole = not own and q1 - 1 - k0 < window
        causal = own and q0 == k0 and q1 - k0 <= window
        if not (whole or causal) and shape not in biases:
            distance = np.arange(q0, q1)[:, None] - np.arange(k0, k1)[None]
            biases[shape] = _bias((distance >= 0) & (distance < window))
        to_query, to_key = here.start - here.position, prefix + above.start - above.position
        yield Part(
            q0 + to_query,
            q1 + to_query,
            k0 + to_key,
            k1 + to_key,
            causal=causal,
            bias=None if whole or causal else biases[shape],
            first=own,
        )
