"""The tree's mask written out densely and attention as ordinary mathematics: what the fast paths are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.tree.layout import TokenTree


def dense_mask(tree: TokenTree, sliding_window: int | None = None) -> Tensor:
    """[tokens, prefix + tokens], True where the row's token may look at the column's."""
    query, end = torch.arange(tree.tokens), torch.as_tensor(tree.subtree_end)
    own = (query[None] <= query[:, None]) & (query[:, None] < end[None])
    mask = torch.cat((torch.ones(tree.tokens, tree.prefix, dtype=torch.bool), own), dim=1)
    if sliding_window is not None:
        position = torch.as_tensor(tree.position_ids)
        key_position = torch.cat((torch.arange(tree.prefix), position))
        mask &= position[:, None] - key_position[None] < sliding_window
    return mask


class DenseContext:
    """An AttentionContext that computes every score of the dense mask, in the dtype it is given.

    It knows no PrefixCache: the keys and values of a prefix are given with the tree's own.
    """

    def __init__(self, tree: TokenTree) -> None:
        self.tree = tree

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = query @ key.mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = dense_mask(self.tree, sliding_window).to(query.device)
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)
