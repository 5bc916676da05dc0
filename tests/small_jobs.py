"""Trainings of a second: a random base of a few kilobytes, rows, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_llama

STEPS = 20
VARIANTS: dict[str, dict[str, Any]] = {
    "lanes": {"adapter": {"rank": 4}},  # micro-batches side by side
    "dropout": {"adapter": {"rank": 4, "dropout": 0.1}},  # random numbers in every step
    "full": {"adapter": None},
}
THREADS = {"lanes": 2, "dropout": 1, "full": 1}


def make_job(folder: Path, variant: str = "lanes", **train: Any) -> Path:
    """Texts, saved every other step, to be stopped and resumed; the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        tiny_llama.save(folder / "base", max_position_embeddings=128)
    words = ("river", "stone", "lamp", "seven", "quiet", "paper", "north")
    texts = [f"{i}: " + " ".join(words[(i * j) % 7] for j in range(1, 5 + i % 5)) for i in range(120)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"max_steps": STEPS, "batch_examples": 12, "lr": 1e-2, "save_every": 2, "eval_every": 10, **train}
    content = {
        "base": str(folder / "base"),
        "data": {"train": "rows.jsonl", "held_out": 0.1},
        "objective": {"kind": "cpt"},
        "train": settings,
        "runtime": {"threads": THREADS[variant]},
        **VARIANTS[variant],
    }
    recipe = folder / f"{variant}.yaml"
    recipe.write_text(json.dumps(content))
    return recipe


def make_questions(folder: Path, *, longest: int = 1, base: dict[str, Any] | None = None, **sections: Any) -> Path:
    """24 prompts with completions of up to `longest` letters, and two contenders to prove; the recipe's path.

    base      settings of the random base
    sections  of the recipe
    """
    tiny_llama.save(folder / "base", **(base or {}))
    rows = [{"prompt": f"item {i} ", "completion": f"is {'abcdefg'[i % 7] * (1 + i % longest)}"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "base": str(folder / "base"),
        "data": {"train": "rows.jsonl", "held_out": 0.25},
        "prove": {"retention": False, "contenders": ["prompt", "tuned"], "max_new_tokens": 4},
        **sections,
    }
    recipe = folder / "job.yaml"
    recipe.write_text(json.dumps(content))
    return recipe
