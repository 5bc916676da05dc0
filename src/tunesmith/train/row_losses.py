"""What each row costs the weights as they are: a forward pass, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tunesmith.data.batches import Layout
from tunesmith.train.annotate import reference
from tunesmith.train.forward import Body
from tunesmith.train.losses import REFERENCE
from tunesmith.types import TokenizedExample


def row_losses(body: Body, examples: Sequence[TokenizedExample], layout: Layout) -> npt.NDArray[np.float64]:
    """The mean negative log-likelihood of each sequence's supervised tokens; each must have some. [sequences]"""
    logprobs = reference(body, examples, layout, lambda *_: None)[REFERENCE]
    return -logprobs.astype(np.float64) / [float(example.weights.sum()) for example in examples]
