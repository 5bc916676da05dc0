"""DoRA (Liu et al. 2024, arXiv:2402.09353): y = g (W x + s B A x) + bias, with g = m / |W + s B A|.

The magnitude m [out] is learned; |.| is the length of each output's row, a constant to the gradient (section 4.3). A
new adapter has m = |W|, so g is 1 and the model starts as the base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tunesmith.models.lora import LoraWeights


@torch.no_grad()
def lengths(weight: Tensor, adapter: LoraWeights) -> Tensor:
    """|W + s B A| of every output, [out]. weight [out, in]."""
    turned = torch.addmm(weight.to(adapter.a.dtype), adapter.b, adapter.a, alpha=adapter.scaling)
    return torch.linalg.vector_norm(turned, dim=1)


def gain(weight: Tensor, adapter: LoraWeights) -> Tensor:
    """g = m / |W + s B A|, [out], differentiable in m alone. weight [out, in]."""
    assert adapter.magnitude is not None
    return adapter.magnitude / lengths(weight, adapter)
