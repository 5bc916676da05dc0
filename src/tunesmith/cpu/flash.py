"""Attention of many rows, each over the keys it sees, forward and backward.

    out[i, h] = sum_j softmax_j(scale q[i, h] . k[j, h / group]) v[j, h / group]      over the keys that row i sees

Flash attention (Dao et al. 2022, arXiv:2205.14135; 2023, arXiv:2307.08691) by the tiles that products are made of: a
block of rows against a few hundred keys at a time, whose scores stay in the cache. Blocks that see nothing of each
other are not computed, so a causal mask costs half and a tree's branches nothing of their neighbours. Keys and values
are laid out in panels first, which costs little beside what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.cpu.flash_kernels import Backward, Forward, slim
from tunesmith.cpu.layouts import lay_out
from tunesmith.cpu.sight import Sight
from tunesmith.cpu.writing import NUMBER, Processor, bits_of, compiled, once, processor, threads_for


def can_see(query: Tensor, value: Tensor) -> bool:
    """Float32 on a CPU with kernels, heads of one size that whole panels hold."""
    on = processor()
    return (
        on is not None
        and query.device.type == "cpu"
        and query.dtype == torch.float32
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % on.columns == 0
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sight: Sight,
    scaling: float,
    out: Tensor,
    lse: Tensor | None = None,
    *,
    goes_on: bool = False,
) -> Tensor:
    """query [rows, heads, dim]; key and value [keys, kv_heads, dim], of any strides; fills out [rows, heads, dim] and
    lse [rows, heads], the log-sum-exp of each row's scores, which is returned.

    goes_on  out and lse are of other keys, which these are added to; a row may then see none of them
    """
    query, key, value = map(_lined_up, (query, key, value))
    assert lse is not None or not goes_on
    lse = query.new_empty(query.shape[:2]) if lse is None else lse
    on = _checked(query, key, value, out, lse, sight)
    panels = _turned(on, key), _split(on, value)
    _forward(on, query.shape[2])(
        threads_for(query.numel() * len(key)),
        *_rows(query),
        *(each.data_ptr() for each in panels),
        out.data_ptr(),
        NUMBER * out.stride(0),
        lse.data_ptr(),
        int(goes_on),
        *_sight_and_sizes(sight, query, key, scaling),
    )
    return lse


def backward(
    d_out: Tensor,
    seen: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    sight: Sight,
    scaling: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of query, key and value, shaped as these. `seen`: query, key, value, out and lse."""
    (query, key, value), (out, lse), d_out = map(_lined_up, seen[:3]), seen[3:], _lined_up(d_out)
    on, (_, heads, dim), (keys, kv_heads, _) = _checked(query, key, value, out, lse, sight), query.shape, key.shape
    d_query, *rest = grads
    assert d_query.stride(2) == 1
    panels = _turned(on, key), _turned(on, value), _split(on, key)
    threads = threads_for(query.numel() * keys)
    parts = min(threads, heads // kv_heads)
    by_part = query.new_zeros(2, kv_heads, parts, keys, dim)
    _backward(on, dim)(
        threads,
        *_rows(query),
        *_rows(d_out),
        out.data_ptr(),
        NUMBER * out.stride(0),
        lse.data_ptr(),
        *(each.data_ptr() for each in panels),
        *_rows(d_query),
        *(each.data_ptr() for each in by_part),
        parts,
        *_sight_and_sizes(sight, query, key, scaling),
    )
    for grad, found in zip(rest, by_part, strict=True):
        grad.copy_(found.sum(1).transpose(0, 1))


def _checked(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, sight: Sight) -> Processor:
    on = processor()
    assert on is not None
    assert key.shape == value.shape
    assert query.shape[1] % key.shape[1] == 0
    assert (query.shape[0], key.shape[0]) == (sight.rows, sight.keys)
    assert out.shape == query.shape
    assert out.stride()[1:] == (out.shape[2], 1)
    assert lse.shape == query.shape[:2]
    assert lse.is_contiguous()
    return on


def _lined_up(x: Tensor) -> Tensor:
    """With a head's numbers side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[int, int, int]:
    """Where [rows, heads, dim] begins, and its steps in bytes."""
    return x.data_ptr(), NUMBER * x.stride(0), NUMBER * x.stride(1)


def _sight_and_sizes(sight: Sight, query: Tensor, key: Tensor, scaling: float) -> list[int]:
    """The arguments that forward and backward end with."""
    (rows, heads, _), (keys, kv_heads, _) = query.shape, key.shape
    arrays = sight.order, sight.places, sight.begins, sight.ends, sight.reach
    tables = [table.buffer_info()[0] for table in (sight.table, sight.starts)]
    seen = [*(each.ctypes.data for each in arrays), *tables, len(sight.starts) - 1]
    return [*seen, rows, heads, heads // kv_heads, keys, bits_of(scaling)]


def _turned(on: Processor, x: Tensor) -> Tensor:
    """[keys, kv_heads, dim] -> [kv_heads, panels, dim, columns]: a key in each column; what is beyond the last is any
    number."""
    (keys, heads, dim), on = x.shape, slim(on)
    out = x.new_empty(heads, -(-keys // on.columns), dim, on.columns)
    lay_out(on, "turned", x, out.data_ptr(), NUMBER * dim * on.columns)
    return out


def _split(on: Processor, x: Tensor) -> Tensor:
    """[keys, kv_heads, dim] -> [kv_heads, dim / columns, keys, columns]."""
    keys, heads, dim = x.shape
    out = x.new_empty(heads, dim // on.columns, keys, on.columns)
    lay_out(on, "split", x, out.data_ptr(), NUMBER * keys * on.columns)
    return out


@once
def _forward(on: Processor, dim: int) -> Callable[..., Any]:
    return compiled(Forward(on, dim).module, "forward")


@once
def _backward(on: Processor, dim: int) -> Callable[..., Any]:
    return compiled(Backward(on, dim).module, "backward")
