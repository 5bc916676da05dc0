import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoders import example, gradients, make_decoder, make_rows, worst_error
from tunesmith.data.batches import (
    Layout,
    StepPlan,
    count_steps,
    epoch_order,
    make_step,
    spread,
    steps_per_epoch,
)
from tunesmith.errors import InputError
from tunesmith.train.forward import ModuleBody
from tunesmith.train.gradient import accumulate
from tunesmith.train.losses import sft
from tunesmith.tree.body import prepare
from tunesmith.tree.layout import build_tree

PROMPT = list(range(3, 43)) * 3


def plan(n=10, batch=4, steps=9, **how):
    rows = [example([5, 6, i], 1, str(i)) for i in range(n)]
    return StepPlan(rows, batch, steps, how.pop("seed", 0), how.pop("shuffle", True), Layout(1000), **how)


def test_epoch_order_is_a_pure_function_of_its_arguments():
    orders = [epoch_order(50, epoch, seed, True).tolist() for epoch in range(3) for seed in range(3)]
    assert orders == [epoch_order(50, epoch, seed, True).tolist() for epoch in range(3) for seed in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    assert epoch_order(50, 2, 1, False).tolist() == list(range(50))
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(50, 2, 1, True)[0] = 7  # every caller is given the same one


def test_a_step_holds_exactly_what_the_order_gives_it():
    made = plan()
    assert steps_per_epoch(10, 4) == 3
    for epoch in range(3):
        ids = [i for step in range(3 * epoch, 3 * epoch + 3) for i in made[step].example_ids]
        assert ids == [str(i) for i in epoch_order(10, epoch, 0, True)]
    assert [round(made[i].epoch, 2) for i in range(4)] == [0.4, 0.8, 1.0, 1.4]
    assert made[7].example_ids == plan()[7].example_ids


@pytest.mark.parametrize(("epochs", "max_steps", "steps"), [(2, None, 6), (0.5, None, 2), (0.01, None, 1), (2, 50, 50)])
def test_how_many_steps(epochs, max_steps, steps):
    assert count_steps(10, 4, epochs, max_steps) == steps


def test_counts_of_a_step():
    step = make_step(0, 1.0, [example([*PROMPT, i, i], 2, str(i)) for i in range(3)], Layout(1000))
    assert (step.tokens, step.computed_tokens, step.supervised_tokens, step.weight) == (366, 123, 6, 6.0)


def test_the_shared_prefix_is_run_once_a_step_whatever_the_micro_batches():
    rows = [example([*PROMPT, i, i + 1, i + 2], 2, str(i)) for i in range(10)]
    for budget in (1000, 140, 60, 10):
        step = make_step(0, 1.0, rows, Layout(budget))
        assert step.computed_tokens == build_tree(rows).tokens
    assert len(step.trees) == 10
    assert step.groups[0].prefix is not None


def test_doubling_the_rows_behind_a_prompt_adds_only_their_own_tokens():
    rows = [example([*PROMPT, i % 50, i // 50, 7], 2, str(i)) for i in range(64)]
    sizes = [make_step(0, 1.0, rows[:n], Layout(200)).computed_tokens for n in (32, 64)]
    assert sizes[1] - sizes[0] <= 32 * 3


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=9), st.integers(1, 40))
@settings(deadline=None)
def test_every_example_stands_in_exactly_one_micro_batch_under_the_budget(ids, budget):
    rows = [example(s, 1, str(i)) for i, s in enumerate(ids)]
    step = make_step(0, 1.0, rows, Layout(budget))
    placed = sorted(i for group in step.groups for chosen in group.examples for i in chosen)
    assert placed == list(range(len(rows)))
    for group in step.groups:
        for tree, chosen in zip(group.trees, group.examples, strict=True):
            assert (
                tree.tokens + tree.prefix <= budget
                or len({rows[i].input_ids[:-1].tobytes() for i in chosen}) == 1
                or chain([rows[i].input_ids[:-1].tolist() for i in chosen])
            )
            assert np.isclose(tree.weights.sum(), sum(rows[i].weights.sum() for i in chosen))


@given(st.lists(st.integers(200, 600), min_size=4, max_size=24), st.integers(0, 400), st.integers(2, 4))
@settings(deadline=None, max_examples=40)
def test_lanes_are_cut_evenly(lengths, prompt, lanes):
    shared = list(range(3, 3 + prompt))
    rows = [example([*shared, 1000 + i, *range(2000, 2000 + n)], 2, str(i)) for i, n in enumerate(lengths)]
    step = make_step(0, 1.0, rows, Layout(100_000, lanes=lanes))
    (group,) = step.groups
    assert sorted(i for chosen in group.examples for i in chosen) == list(range(len(rows)))
    sizes = [tree.tokens for tree in group.trees]
    assert 2 <= len(sizes) <= lanes
    own = sum(n + 1 for n in lengths)
    assert max(sizes) <= own / lanes + max(lengths) + 64  # rows are whole, and a short prompt stands in every lane


@given(st.lists(st.integers(1, 200), max_size=20), st.integers(1, 4), st.integers(1, 400))
def test_pieces_are_spread_evenly_over_bins_of_a_size(sizes, parts, room):
    bins = spread(sizes, parts, room)
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    assert all(len(own) == 1 or sum(sizes[i] for i in own) <= room for own in bins)
    small = sorted((i for i in range(len(sizes)) if sizes[i] <= room), key=sizes.__getitem__)
    sums = [sum(sizes[i] for i in own) for own in bins if not any(sizes[i] > room for i in own)]
    if len(small) >= parts and len(sums) > 1:
        assert max(sums) - min(sums) <= sizes[small[-1]]


def test_the_fullest_bin_is_the_least_that_can_be_had_of_four():
    assert spread([129, 125, 53, 96], 2, 1000) == [[0, 2], [1, 3]]


def chain(ids):
    ids = sorted(ids, key=len)
    return all(b[: len(a)] == a for a, b in itertools.pairwise(ids))


MODEL = make_decoder("llama")


@given(st.integers(0, 1000), st.integers(8, 120), st.integers(9, 80))
@settings(max_examples=12, deadline=None)
def test_one_micro_batch_or_eight_give_the_same_gradient(seed, budget, prompt):
    prepare(MODEL)
    parameters, body = dict(MODEL.named_parameters()), ModuleBody(MODEL)
    rows = make_rows(seed, prompt=prompt)
    found = []
    for layout in (Layout(100_000), Layout(budget), Layout(prompt + 12), Layout(1, share=False, pack=False)):
        step = make_step(0, 1.0, rows, layout)
        total, _ = accumulate(body, step, sft)
        found.append((total, gradients(parameters)))
    for total, grads in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-9)
        assert worst_error(found[0][1], grads) < 1e-9


def test_a_row_longer_than_the_budget_runs_alone_and_is_reported():
    rows = [example(list(range(3, 33)), 1, "long"), example([50, 51], 1, "short"), example([52, 51], 1, "other")]
    step = make_step(0, 1.0, rows, Layout(8))
    assert [tree.tokens for tree in step.trees] == [29, 2]
    made = StepPlan(rows, 3, 1, 0, False, Layout(8))
    assert [row.example_id for row in made.too_long()] == ["long"]


def test_rows_that_share_nothing_are_packed():
    rows = [example([3 + i, 40, 41], 1, str(i)) for i in range(4)]
    step = make_step(0, 1.0, rows, Layout(4))
    assert [tree.tokens for tree in step.trees] == [4, 4]
    assert all(group.prefix is None for group in step.groups)


def test_models_whose_neighbours_leak_get_one_row_at_a_time():
    step = make_step(0, 1.0, make_rows(), Layout(1000, share=False, pack=False))
    assert len(step.trees) == len(step.examples)


def test_a_step_without_anything_to_learn_is_refused_by_row():
    with pytest.raises(InputError, match=r"no supervised token \(rows a, b\)"):
        make_step(0, 1.0, [example([3, 4], 0, "a"), example([5, 4], 0, "b")], Layout(10))
    with pytest.raises(InputError, match="there are no rows to train on"):
        StepPlan([], 4, 1, 0, True, Layout(10))
