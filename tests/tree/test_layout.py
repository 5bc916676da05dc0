import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoders import example, make_rows
from tunesmith.errors import InputError
from tunesmith.tree.layout import build_tree

sequences = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=8)


def test_the_example_of_the_module():
    a, b = [7, 7, 7, 1, 1, 4, 4, 6], [7, 7, 7, 2, 2, 5, 6]
    tree = build_tree([example(a, 3), example(b, 2)])
    assert tree.input_ids.tolist() == [7, 7, 7, 1, 1, 4, 4, 2, 2, 5]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5]
    assert tree.subtree_end.tolist() == [10, 10, 10, 7, 7, 7, 7, 10, 10, 10]
    assert list(zip(tree.rows, tree.targets, tree.weights, strict=True)) == [
        (4, 4, 1),
        (5, 4, 1),
        (6, 6, 1),
        (8, 5, 1),
        (9, 6, 1),
    ]


@given(sequences)
def test_every_distinct_prefix_before_a_last_target_once_and_every_token_sees_its_own_past(ids):
    rows = [example(s, 1 + len(s) // 3, str(i)) for i, s in enumerate(ids)]
    tree = build_tree(rows)
    assert tree.tokens == len({tuple(s[:n]) for s in ids for n in range(1, len(s))})
    for i, row in enumerate(rows):
        mine = tree.links.sequence == i
        tokens, entries = tree.links.token[mine], tree.links.entry[mine]
        assert tokens.tolist() == np.flatnonzero(row.weights).tolist()
        assert tree.targets[entries].tolist() == row.input_ids[tokens].tolist()
        for token, at in zip(tokens, tree.rows[entries], strict=True):
            seen = [k for k in range(at + 1) if at < tree.subtree_end[k]]
            assert tree.input_ids[seen].tolist() == row.input_ids[:token].tolist()
            assert tree.position_ids[seen].tolist() == list(range(token))
    assert tree.weights.sum() == sum(row.weights.sum() for row in rows)


def test_shared_supervised_tokens_carry_the_sum_of_their_weights():
    rows = [example([1, 2, 3], 2), example([1, 2, 4], 2, weight=2)]
    tree = build_tree(rows)
    assert {(int(r), int(t)): float(w) for r, t, w in zip(tree.rows, tree.targets, tree.weights, strict=True)} == {
        (0, 2): 3.0,
        (1, 3): 1.0,
        (1, 4): 2.0,
    }


def test_duplicates_and_a_prefix_equal_to_a_whole_row_add_no_token():
    rows = [example([5, 6, 7, 8], 1), example([5, 6], 1), example([5, 6, 7, 8], 1)]
    tree = build_tree(rows)
    assert tree.tokens == 3
    assert sorted(tree.weights.tolist()) == [1, 2]


def test_what_follows_the_last_target_is_not_computed():
    row = example([5, 6, 7, 8, 9], 3)
    row.weights[3:] = 0
    tree = build_tree([row, example([5, 6, 7, 8, 4], 1)])
    assert tree.input_ids.tolist() == [5, 6, 7, 8]
    assert build_tree([row]).input_ids.tolist() == [5, 6]


def test_without_sharing_every_row_is_its_own_document():
    rows = make_rows()
    tree = build_tree(rows, share=False)
    assert tree.tokens == sum(len(row.input_ids) - 1 for row in rows)
    assert (tree.position_ids == 0).sum() == len(rows)


def test_a_prefix_computed_elsewhere_leaves_the_rest():
    rows = [example([9, 9, 1, 2, 3], 2), example([9, 9, 1, 4, 5], 1)]
    tree = build_tree(rows, prefix=2)
    assert tree.input_ids.tolist() == [1, 2, 4]
    assert tree.position_ids.tolist() == [2, 3, 3]
    assert tree.links.token.tolist() == [3, 4, 4]


def test_bad_groups_are_named():
    with pytest.raises(InputError, match="group of sequences is empty"):
        build_tree([])
    with pytest.raises(InputError, match="row with id none has no token"):
        build_tree([example([1, 2], 1), example([], 0, "none")])
