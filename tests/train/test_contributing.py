"""The example that CONTRIBUTING.md gives of a new objective does train."""

import re
from pathlib import Path
from typing import get_args

import pytest
from test_preferences import LAYOUTS, make_pairs, make_run

from tunesmith import recipe
from tunesmith.data.batches import StepPlan
from tunesmith.train import losses, methods
from tunesmith.train.loop import Hooks, train


def test_the_example_of_a_new_objective_trains(monkeypatch):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    names = {**vars(recipe), **vars(losses), **vars(methods)}
    exec(compile(code, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    method = methods.method_of(names["Simpo"]())
    assert method.rows == ("preference",)
    _, body, parameters = make_run()
    rows, seen = make_pairs(), []
    steps = StepPlan(rows, len(rows) // 2, 8, 0, True, LAYOUTS[0])
    train(body, parameters, steps, method.loss, recipe.Train(), lr=1e-2, hooks=Hooks(on_step=seen.append))
    assert seen[-1].loss < seen[0].loss - 0.1
    assert seen[-1].measures["reward_accuracy"] >= seen[0].measures["reward_accuracy"]


def test_every_name_is_an_objective_of_the_recipe_and_no_other():
    taken = {section.model_fields["kind"].default for section in get_args(get_args(recipe.Objective)[0])}
    assert taken == methods.METHODS.keys()
    with pytest.raises(ValueError):
        recipe.Recipe(data={"train": "a"}, objective={"kind": "simpo"})
