"""plan.json: what was predicted beside what it took, and money where a price was stated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from small_jobs import make_job
from tunesmith import train
from tunesmith.recipe import Recipe
from tunesmith.store.runs import read_json

TABLE = Path(__file__).parents[1] / "benchmarks" / "plan.py"


def test_what_it_took_stands_beside_what_was_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    job = make_job(tmp_path / "job", "dropout", max_steps=4, eval_every=0)
    recipe = Recipe.load(job, ["runtime.price_per_hour=3.6"])
    assert recipe.hash() == Recipe.load(job).hash()
    done = train(recipe, tmp_path / "run")
    plan = read_json(done.plan)
    predicted, actual = plan["predicted"], plan["actual"]
    assert (actual["steps"], actual["tokens"]) == (predicted["steps"], predicted["tokens"])
    assert actual["computed_tokens"] == predicted["computed_tokens"]
    for facts in (predicted, actual):
        assert facts["money"] == pytest.approx(facts["seconds"] / 1000)
    printed = subprocess.run([sys.executable, TABLE, done.folder], capture_output=True, text=True).stdout
    assert printed.splitlines()[-1].startswith("| run | 4 | ")
