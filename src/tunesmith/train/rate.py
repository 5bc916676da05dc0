"""The learning rate where the recipe says auto."""

from __future__ import annotations

FULL, LORA_TIMES, WIDTH, EXPONENT = 5e-5, 10.0, 2000, 0.78


def choose_lr(hidden_size: int, *, lora: bool, objective: str = "sft", times: float = 1.0) -> tuple[float, str]:
    """A peak learning rate, and the sentence that says why. `times`: the objective's own factor.

    lr = 5e-5 * (10 for LoRA) * (2000 / hidden_size) ** 0.78: Schulman et al., "LoRA Without Regret" (2025), which finds
    the best rate for LoRA to be about ten times that for full fine-tuning and, with alpha / rank scaling, independent
    of the rank. The exponent is its fit for the Llama family.
    """
    rate = FULL * (LORA_TIMES if lora else 1.0) * (WIDTH / hidden_size) ** EXPONENT * times
    rounded = float(f"{rate:.1e}")
    kind = "an adapter" if lora else "full fine-tuning"
    why = f"learning rate {rounded:g}: chosen for {kind} on a hidden size of {hidden_size}"
    return rounded, why if times == 1 else f"{why}, times {times:g} for objective {objective}"
