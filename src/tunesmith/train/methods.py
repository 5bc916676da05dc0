"""What there is to train by: a name in the recipe, and for each the rows it takes, its loss and what that needs.

The loop knows none of them. CONTRIBUTING.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.recipe import Objective, is_endpoint
from tunesmith.train.annotate import Annotate, base_likeliest, reference
from tunesmith.train.losses import Loss, Surveyed, distillation, dpo, kto, leashed, orpo, sft

# Times the rate for learning answers: a preference moves a model that can answer already. DPO's is Zephyr's, 5e-7 after
# 2e-5 (Tunstall et al. 2023, arXiv:2310.16944); KTO bears more (docs/METHODS.md).
DPO_LR, KTO_LR = 0.025, 0.1


@dataclass(frozen=True, slots=True)
class Method:
    """One objective.

    rows       the kinds of Example it learns from
    pieces     texts longer than the limit are cut into several examples
    strangers  a pair comes with a third sequence, its prompt with another prompt's answer
    annotate   computes the columns that the loss reads, before the first step
    of_base    they are the base's own, whatever adapter training starts from
    taught     a teacher answers the rows first, and its columns come with them (teaching.py)
    lr_times   what `train.lr: auto` is multiplied by
    """

    loss: Loss
    rows: tuple[str, ...]
    pieces: bool = False
    strangers: bool = False
    annotate: Annotate | None = None
    of_base: bool = False
    taught: bool = False
    lr_times: float = 1.0

    @property
    def has_answers(self) -> bool:
        """Texts ask nothing: their measure is the held-out loss, before and after."""
        return self.rows != ("text",)


def near_base(method: Method, beta: float) -> Method:
    """A method that learns tokens, on a leash to the base where it costs something to leave it."""
    if not beta:
        return method
    assert not isinstance(method.loss, Surveyed)
    return replace(method, loss=leashed(method.loss, beta), annotate=base_likeliest, of_base=True)


METHODS: dict[str, Callable[[Any], Method]] = {
    "sft": lambda keys: near_base(Method(sft, ("chat", "completion", "text")), keys.kl_to_base),
    "cpt": lambda keys: near_base(Method(sft, ("text",), pieces=True), keys.kl_to_base),
    "dpo": lambda keys: Method(dpo(keys.beta), ("preference",), annotate=reference, lr_times=DPO_LR),
    "orpo": lambda keys: Method(orpo(keys.beta), ("preference",)),
    "kto": lambda keys: Method(kto(keys.beta), ("preference",), strangers=True, annotate=reference, lr_times=KTO_LR),
    "compress": lambda _: Method(distillation(1.0), ("chat", "input"), taught=True),
    "distill": lambda keys: near_base(
        Method(sft if is_endpoint(keys.teacher) else distillation(keys.kl_share), ("chat", "input"), taught=True),
        keys.kl_to_base,
    ),
}


def method_of(objective: Objective) -> Method:
    """The method of a recipe's `objective` section."""
    return METHODS[objective.kind](objective)
