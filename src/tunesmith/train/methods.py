"""What there is to train by: a name in the recipe, and for each the rows it takes, its loss and what that needs.

The loop knows none of them. CONTRIBUTING.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunesmith.recipe import Objective, is_endpoint
from tunesmith.train.annotate import Annotate, reference
from tunesmith.train.losses import Loss, distillation, dpo, kto, orpo, sft

PREFERENCE_LR = 0.1  # times the rate for learning answers: a preference moves a model that can answer already


@dataclass(frozen=True, slots=True)
class Method:
    """One objective.

    rows       the kinds of Example it learns from
    pieces     texts longer than the limit are cut into several examples
    strangers  a pair comes with a third sequence, its prompt with another prompt's answer
    annotate   computes the columns that the loss reads, before the first step
    taught     a teacher answers the rows first, and its columns come with them (teaching.py)
    lr_times   what `train.lr: auto` is multiplied by
    """

    loss: Loss
    rows: tuple[str, ...]
    pieces: bool = False
    strangers: bool = False
    annotate: Annotate | None = None
    taught: bool = False
    lr_times: float = 1.0

    @property
    def has_answers(self) -> bool:
        """Texts ask nothing: their measure is the held-out loss, before and after."""
        return self.rows != ("text",)


METHODS: dict[str, Callable[[Any], Method]] = {
    "sft": lambda _: Method(sft, ("chat", "completion", "text")),
    "cpt": lambda _: Method(sft, ("text",), pieces=True),
    "dpo": lambda keys: Method(dpo(keys.beta), ("preference",), annotate=reference, lr_times=PREFERENCE_LR),
    "orpo": lambda keys: Method(orpo(keys.beta), ("preference",)),
    "kto": lambda keys: Method(
        kto(keys.beta), ("preference",), strangers=True, annotate=reference, lr_times=PREFERENCE_LR
    ),
    "compress": lambda _: Method(distillation(1.0), ("chat", "input"), taught=True),
    "distill": lambda keys: Method(
        sft if is_endpoint(keys.teacher) else distillation(keys.kl_share), ("chat", "input"), taught=True
    ),
}


def method_of(objective: Objective) -> Method:
    """The method of a recipe's `objective` section."""
    return METHODS[objective.kind](objective)
