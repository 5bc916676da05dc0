"""Attention over one part of a tree: PyTorch's flash kernel for CPU where it applies, ordinary mathematics elsewhere.

The flash kernel takes float and double, grouped heads and any strides, and gives the log-sum-exp. It has no
soft-capping, wants one head size, and crashes on an empty range.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tunesmith.tree.parts import Part

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SCORES_AT_ONCE = 1 << 22  # scores that ordinary mathematics holds at a time


def forward_part(
    query: Tensor, key: Tensor, value: Tensor, part: Part, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """query [1, heads, q, dim], key and value [1, kv_heads, k, dim] -> output [1, heads, q, dim], lse [1, heads, q]."""
    if _has_flash(query, value, softcap):
        bias = None if part.bias is None else part.bias.to(query.dtype)
        return _flash(query, key, value, 0.0, part.causal, attn_mask=bias, scale=scaling)
    outs, lses = [], []
    for rows in _blocks(query, key):
        scores, _ = _scores(query, key, part, rows, scaling, softcap)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse[..., None]).exp_()
        outs.append(_ungroup(probabilities @ value[:, :, None].to(scores.dtype)).to(query.dtype))
        lses.append(_ungroup(lse))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def backward_part(
    grad_out: Tensor,
    forward: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    part: Part,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's query, key and value. `forward`: these, then out and lse of ALL the queries' parts."""
    query, key, value, out, lse = forward
    if _has_flash(query, value, softcap):
        bias = None if part.bias is None else part.bias.to(query.dtype)
        return _flash_backward(grad_out, query, key, value, out, lse, 0.0, part.causal, attn_mask=bias, scale=scaling)
    kv_heads, dtype = key.shape[1], lse.dtype
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
    for rows in _blocks(query, key):
        scores, slope = _scores(query, key, part, rows, scaling, softcap)
        upstream = _group(grad_out[:, :, rows], kv_heads).to(dtype)
        weighted = (upstream * _group(out[:, :, rows], kv_heads)).sum(-1, keepdim=True)
        probabilities = (scores - _group(lse[:, :, rows], kv_heads)[..., None]).exp_()
        grad_value += (probabilities.mT @ upstream).sum(2)
        # d scores = p * (d p - sum over keys of p d p), and that sum is grad_out . out (FlashAttention, sec. 3.1)
        grad_scores = probabilities * (upstream @ value[:, :, None].to(dtype).mT - weighted) * scaling
        if slope is not None:
            grad_scores *= slope
        grad_query[:, :, rows] = _ungroup(grad_scores @ key[:, :, None].to(dtype)).to(query.dtype)
        grad_key += (grad_scores.mT @ _group(query[:, :, rows], kv_heads).to(dtype)).sum(2)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _has_flash(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    return softcap is None and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    rows = max(1, SCORES_AT_ONCE // (query.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], rows):
        yield slice(start, min(start + rows, query.shape[2]))


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """[1, heads, ...] -> [1, kv_heads, heads per kv head, ...]."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def _ungroup(x: Tensor) -> Tensor:
    return x.flatten(1, 2)


def _scores(
    query: Tensor, key: Tensor, part: Part, rows: slice, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Masked scores [1, kv_heads, group, rows, keys] in at least float32, and the slope of the soft-capping."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = _group(query[:, :, rows], key.shape[1]).to(dtype) @ key[:, :, None].to(dtype).mT * scaling
    slope = None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        slope, scores = 1 - capped.square(), capped * softcap
    if part.bias is not None:
        scores = scores + part.bias[rows].to(scores)
    elif part.causal:
        row = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
        scores = scores.masked_fill(torch.arange(key.shape[2], device=scores.device)[None] > row, -torch.inf)
    return scores, slope
