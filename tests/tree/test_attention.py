"""Attention over a tree against the dense mask, on random tries: by parts, and by the kernel where there is one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoders import example
from tunesmith.tree import flex, kernels, parts
from tunesmith.tree.attention import PrefixCache, TreeContext
from tunesmith.tree.layout import build_tree
from tunesmith.tree.oracle import DenseContext, dense_mask

sequences = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=7)


@pytest.fixture(params=[(128, 512), (5, 3), (0, 1)], ids=["as it is", "small", "none"])
def sizes(request, monkeypatch):
    """Bundles and blocks small enough for tiny tries to have several."""
    bundle, block = request.param
    monkeypatch.setattr(parts, "BUNDLE", bundle)
    monkeypatch.setattr(parts, "BLOCK", block)
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", 64)


def tree_of(ids, prefix=0):
    return build_tree([example([7] * prefix + s, 0) for s in ids], prefix=prefix)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("prefix", [0, 4])
def test_parts_cover_every_visible_pair_once(sizes, window, prefix):
    @given(sequences)
    @settings(max_examples=15, deadline=None)
    def check(ids):
        tree = tree_of(ids, prefix)
        plan = parts.plan_parts(tree, window)
        count, touched = np.zeros((plan.tokens, plan.keys), dtype=int), np.zeros(plan.tokens, dtype=int)
        keys = np.zeros(plan.keys, dtype=int)
        for part in plan.parts:
            seen = np.ones((part.q1 - part.q0, part.k1 - part.k0), dtype=bool)
            if part.causal:
                seen = np.tril(seen)
            if part.bias is not None:
                seen = part.bias.numpy() == 0
            assert seen.any(1).all(), "a query without a key: the kernel would answer 0"
            count[part.q0 : part.q1, part.k0 : part.k1] += seen
            assert (touched[part.q0 : part.q1] == 0).all() == part.first
            assert part.first or (touched[part.q0 : part.q1] > 0).all()
            touched[part.q0 : part.q1] += 1
            keys[part.k0 : part.k1] += 1
        assert (count == dense_mask(tree, window).numpy()).all()
        assert not plan.keys_once or (keys == 1).all()

    check()


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 3])
def test_forward_and_backward_are_the_oracles(sizes, window, softcap):
    @given(sequences)
    @settings(max_examples=6, deadline=None)
    def check(ids):
        tree = tree_of(ids)
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, h, tree.tokens, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
        upstream = torch.randn(1, tree.tokens, 4, 8, dtype=torch.float64)
        results = []
        for context in (DenseContext(tree), TreeContext(tree)):
            out = context.attend(0, q, k, v, scaling=0.3, sliding_window=window, softcap=softcap)
            results.append((out, *torch.autograd.grad(out, (q, k, v), upstream)))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)

    check()


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("prefix", [0, 21])
def test_in_float32_they_are_the_oracles_too(window, prefix):
    @given(sequences)
    @settings(max_examples=4, deadline=None)
    def check(ids):
        tree = tree_of([[7] * prefix + s * 9 for s in ids], prefix)
        torch.manual_seed(0)
        keys = prefix + tree.tokens
        q, k, v = (torch.randn(1, h, n, 32, requires_grad=True) for h, n in ((4, tree.tokens), (2, keys), (2, keys)))
        upstream = torch.randn(1, tree.tokens, 4, 32)
        cache = PrefixCache({0: k[:, :, :prefix]}, {0: v[:, :, :prefix]}) if prefix else None
        how = {"scaling": 0.3, "sliding_window": window, "softcap": None}
        actual = TreeContext(tree, prefix=cache).attend(0, q, k[:, :, prefix:], v[:, :, prefix:], **how)
        found = torch.autograd.grad(actual, (q, k, v), upstream)
        exact = [each.double() for each in (q, k, v)]
        expected = DenseContext(tree).attend(0, *exact, **how)
        wanted = torch.autograd.grad(expected, (q, k, v), upstream.double())
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))

    check()


def test_a_prefix_given_as_keys_and_values_is_as_good_as_one_in_the_tree(sizes):
    ids = [[0, 1, 1], [0, 1, 0, 1], [1]]
    whole, cut = tree_of([[7] * 4 + s for s in ids]), tree_of(ids, prefix=4)
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, h, whole.tokens, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    how = {"scaling": 0.3, "sliding_window": None, "softcap": None}
    cache = PrefixCache({0: k[:, :, :4]}, {0: v[:, :, :4]})
    expected = TreeContext(whole).attend(0, q, k, v, **how)[:, 4:]
    actual = TreeContext(cut, prefix=cache).attend(0, q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], **how)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    for e, a in zip(
        torch.autograd.grad(expected, (q, k, v), upstream),
        torch.autograd.grad(actual, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_unequal_head_sizes_go_through_ordinary_mathematics():
    tree = tree_of([[0, 1, 1], [0, 1, 0, 1]])
    q, k = torch.randn(2, 1, 4, tree.tokens, 8)
    v = torch.randn(1, 4, tree.tokens, 6)
    how = {"scaling": 0.3, "sliding_window": None, "softcap": None}
    expected, actual = (c.attend(0, q, k, v, **how) for c in (DenseContext(tree), TreeContext(tree)))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prefix", [0, 4])
def test_the_mask_of_the_gpu_path_is_the_oracles(monkeypatch, window, softcap, prefix):
    """FlexAttention runs uncompiled on a CPU, forward only: enough to hold its mask and its score to the oracle."""
    monkeypatch.setattr(flex, "compiled", lambda: flex.flex_attention)
    ids = [[0, 1, 1], [0, 1, 0, 1], [1], [0, 1, 1, 0, 0]]
    whole, cut = tree_of([[7] * 4 + s for s in ids]), tree_of(ids, prefix=4)
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, h, whole.tokens, 16) for h in (4, 2, 2))
    how = {"scaling": 0.3, "softcap": softcap}
    expected = DenseContext(whole).attend(0, q, k, v, sliding_window=window, **how)
    tree, rows = (cut, slice(4, None)) if prefix else (whole, slice(None))
    mask = flex.block_mask(tree, window, torch.device("cpu"))
    actual = flex.flex(q[:, :, rows], k, v, mask, **how)
    torch.testing.assert_close(actual, expected[:, rows], rtol=1e-4, atol=1e-5)
