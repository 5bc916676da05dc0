"""`plan --data-need` on the real base: every share starts from the same weights, and the answer is a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tunesmith
from tunesmith.errors import InputError
from tunesmith.recipe import Recipe

pytestmark = pytest.mark.base
PAINTS = ("red", "green", "blue", "white")


def recipe(folder: Path, base: Path, rows: int, *overrides: str) -> Recipe:
    lines = (json.dumps({"input": f"box {i * i} of {PAINTS[i % 4]}", "output": PAINTS[i % 4]}) for i in range(rows))
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "job.yaml").write_text(
        "data: {train: rows.jsonl, held_out: 0.35}\ntrain: {max_steps: 4, batch_examples: 16, lr: 2.0e-3}\n"
        "prove: {scorers: [exact_match], max_new_tokens: 3}\n"
    )
    return Recipe.load(folder / "job.yaml", [f"base={base}", *overrides])


def test_the_answer_comes_from_four_shares_that_start_alike(tmp_path: Path, base: Path) -> None:
    plan = tunesmith.plan(recipe(tmp_path, base, 110), data_need=True, picture=tmp_path / "need.svg")
    need = plan.need
    assert need is not None
    assert (need.steps, need.shares) == (4, (8, 16, 32, 64))
    facts = plan.to_json()["data_need"]
    score, loss = facts["measures"]
    assert (score["name"], loss["name"]) == ("exact match", "held-out loss")
    assert score["items"] >= 24
    assert loss["points"][0] != loss["points"][-1]
    assert all(point < 3 for point in loss["points"])
    assert f"with {2 * need.rows:,} examples expect" in loss["sentence"] or not loss["fits"]
    assert loss["sentence"] in plan.render()
    assert (tmp_path / "need.svg").read_text().startswith("<svg")


def test_what_cannot_be_measured_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InputError, match="at least 64 different training rows"):
        tunesmith.plan(recipe(tmp_path, base, 40), data_need=True)
    with pytest.raises(InputError, match=r"set data\.held_out"):
        tunesmith.plan(recipe(tmp_path, base, 80, "data.held_out=0"), data_need=True)
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        tunesmith.plan(recipe(tmp_path, base, 80), data_need=True, picture=tmp_path / "need.gif")
