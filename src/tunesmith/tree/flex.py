"""Attention over a token tree on CUDA: FlexAttention, compiled, with the tree's one-line mask."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tunesmith.tree.layout import TokenTree


def block_mask(tree: TokenTree, sliding_window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries needs; keys are counted with the prefix in front."""
    position = torch.as_tensor(tree.position_ids, device=device)
    key_position = torch.cat((torch.arange(tree.prefix, device=device), position))
    end = torch.as_tensor(tree.subtree_end, device=device)
    end = torch.cat((end.new_full((tree.prefix,), tree.tokens), end))  # the prefix's subtree is the whole tree

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k - tree.prefix <= q) & (q < end[k])
        return seen if sliding_window is None else seen & (position[q] - key_position[k] < sliding_window)

    return create_block_mask(visible, None, None, tree.tokens, tree.prefix + tree.tokens, device=device)


@lru_cache(maxsize=1)
def compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float, softcap: float | None) -> Tensor:
    """query, key, value [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    out = compiled()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)
