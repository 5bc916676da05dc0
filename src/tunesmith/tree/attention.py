"""Attention over a token tree.

CPU: our own kernel over blocks of tokens that see each other (cpu/flash.py) where it applies, elsewhere a cascade. Each
part of the tree (parts.py) is an ordinary attention; parts that share queries are merged by their log-sum-exp, exactly:
softmax over a union of keys is the sum of the softmaxes over its pieces, each weighted by exp(lse_piece - lse_union).
The backward of a part is the ordinary one, given the MERGED output and log-sum-exp, because its probabilities are then
those of the union (the identity ring attention uses, arXiv:2310.01889).
CUDA: FlexAttention with the tree's one-line mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from tunesmith.cpu import flash
from tunesmith.cpu.sight import Seen, Sight, reach_of
from tunesmith.tree.flex import block_mask, flex
from tunesmith.tree.kernels import backward_part, forward_part
from tunesmith.tree.layout import TokenTree
from tunesmith.tree.parts import Parts, plan_parts


@dataclass
class PrefixCache:
    """Keys and values of a prefix computed once, by layer: [1, kv_heads, prefix, dim] each."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def leaves(self) -> PrefixCache:
        """The same values cut off from the graph, to collect gradients in."""
        return PrefixCache(
            {layer: key.detach().requires_grad_() for layer, key in self.keys.items()},
            {layer: value.detach().requires_grad_() for layer, value in self.values.items()},
        )

    def tensors(self) -> list[Tensor]:
        """Keys, then values, by layer."""
        return [t for side in (self.keys, self.values) for _, t in sorted(side.items())]


class View:
    """What a tree's tokens see in the layers of one window, as each way to compute it wants to know it."""

    def __init__(self, tree: TokenTree, sliding_window: int | None) -> None:
        self.tree, self.window = tree, sliding_window

    @cached_property
    def parts(self) -> Parts:
        return plan_parts(self.tree, self.window)

    @cached_property
    def sight(self) -> Sight:
        tree = self.tree
        keys, tokens = np.arange(-tree.prefix, tree.tokens), np.arange(tree.tokens)
        ends = np.concatenate([np.full(tree.prefix, tree.tokens), tree.subtree_end])
        places = np.concatenate([np.arange(tree.prefix), tree.position_ids])
        return Sight(Seen(tokens, tree.position_ids, keys, ends, reach_of(places, self.window)))


class TreeContext:
    """An AttentionContext for one TokenTree. `prefix` gives the keys and values of the tokens before the tree."""

    def __init__(self, tree: TokenTree, *, prefix: PrefixCache | None = None, record: bool = False) -> None:
        assert (prefix is not None) == (tree.prefix > 0), "a tree with a prefix needs its cache, and only such a tree"
        self.tree, self.prefix = tree, prefix
        self.recorded = PrefixCache() if record else None
        self._views: dict[int | None, View] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def view(self, sliding_window: int | None) -> View:
        if sliding_window not in self._views:
            self._views[sliding_window] = View(self.tree, sliding_window)
        return self._views[sliding_window]

    def _block_mask(self, sliding_window: int | None, device: torch.device) -> BlockMask:
        if sliding_window not in self._block_masks:
            self._block_masks[sliding_window] = block_mask(self.tree, sliding_window, device)
        return self._block_masks[sliding_window]

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
        if self.recorded is not None:
            self.recorded.keys[layer], self.recorded.values[layer] = key, value
        if self.prefix is not None:
            key = torch.cat((self.prefix.keys[layer], key), dim=2)
            value = torch.cat((self.prefix.values[layer], value), dim=2)
        if query.device.type == "cuda":
            return flex(query, key, value, self._block_mask(sliding_window, query.device), scaling, softcap)
        return _Attend.apply(query, key, value, self.view(sliding_window), scaling, softcap)


def tree_forward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, view: View, scaling: float, softcap: float | None
) -> Tensor:
    """query, key, value [1, heads, tokens, dim]; fills out [1, tokens, heads, dim]; returns lse [1, tokens, heads]."""
    if softcap is None and flash.can_see(query, value):
        q, k, v = map(_tokens_first, (query, key, value))
        return flash.forward(q, k, v, view.sight, scaling, out[0])[None]
    return _cascade_forward(query, key, value, out, view.parts, scaling, softcap)


def tree_backward(
    grad_out: Tensor,
    forward: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    view: View,
    scaling: float,
    softcap: float | None,
) -> None:
    """Writes the gradients of query, key and value into `grads`. `forward`: query, key, value, out and lse."""
    query, key, value, out, lse = forward
    if softcap is not None or not flash.can_see(query, value):
        _cascade_backward(grad_out, forward, grads, view.parts, scaling, softcap)
        return
    q, k, v, dq, dk, dv = map(_tokens_first, (query, key, value, *grads))
    flash.backward(grad_out[0], (q, k, v, out[0], lse[0]), view.sight, scaling, (dq, dk, dv))


def _tokens_first(x: Tensor) -> Tensor:
    """[1, heads, tokens, dim] -> [tokens, heads, dim], a view."""
    return x[0].transpose(0, 1)


def _cascade_forward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, parts: Parts, scaling: float, softcap: float | None
) -> Tensor:
    lse = query.new_empty(out.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
    for part in parts.parts:
        rows, cols = slice(part.q0, part.q1), slice(part.k0, part.k1)
        piece, piece_lse = forward_part(query[:, :, rows], key[:, :, cols], value[:, :, cols], part, scaling, softcap)
        piece, piece_lse = piece.transpose(1, 2), piece_lse.transpose(1, 2)
        if part.first:
            out[:, rows], lse[:, rows] = piece, piece_lse
            continue
        union = torch.logaddexp(lse[:, rows], piece_lse)
        old, new = (lse[:, rows] - union).exp_()[..., None], (piece_lse - union).exp_()[..., None]
        out[:, rows] = (out[:, rows] * old).addcmul_(piece.to(old.dtype), new)
        lse[:, rows] = union
    return lse


def _cascade_backward(
    grad_out: Tensor,
    forward: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    parts: Parts,
    scaling: float,
    softcap: float | None,
) -> None:
    query, key, value, out, lse = forward
    grad_query, grad_key, grad_value = grads
    if not parts.keys_once:
        grad_key.zero_()
        grad_value.zero_()
    grad_out, out, lse = grad_out.transpose(1, 2), out.transpose(1, 2), lse.transpose(1, 2)
    for part in parts.parts:
        rows, cols = slice(part.q0, part.q1), slice(part.k0, part.k1)
        seen = (query[:, :, rows], key[:, :, cols], value[:, :, cols], out[:, :, rows], lse[:, :, rows])
        dq, dk, dv = backward_part(grad_out[:, :, rows], seen, part, scaling, softcap)
        _put(grad_query[:, :, rows], dq, part.first)
        _put(grad_key[:, :, cols], dk, parts.keys_once)
        _put(grad_value[:, :, cols], dv, parts.keys_once)


def _put(target: Tensor, grad: Tensor, first: bool) -> None:
    if first:
        target.copy_(grad)
    else:
        target.add_(grad)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, view: View, scaling: float, softcap: float | None
    ) -> Tensor:
        out = query.new_empty(1, view.tree.tokens, query.shape[1], value.shape[-1])
        lse = tree_forward(query, key, value, out, view, scaling, softcap)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.view, ctx.scaling, ctx.softcap = view, scaling, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        # Token-major in memory, as the model's own linears will want them.
        grads = tuple(t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (query, key, value))
        forward = (query, key, value, out, lse)
        tree_backward(upstream[0], forward, grads, ctx.view, ctx.scaling, ctx.softcap)
        return *grads, None, None, None
