import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.tree import heads
from tunesmith.tree.heads import Entries, Head, Scores

ENTRIES = Entries(torch.tensor([0, 0, 1, 3, 4, 4, 4]), torch.tensor([2, 5, 2, 9, 0, 10, 0]))


def make(dtype=torch.float64, **how):
    torch.manual_seed(0)
    hidden = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, dtype=dtype, requires_grad=True)
    return hidden, Head(weight, bias, **how)


def reference(hidden, head, entries):
    return head.logits(hidden).log_softmax(-1)[entries.rows, entries.targets]


@pytest.mark.parametrize("how", [{}, {"scale": 0.4}, {"softcap": 1.5}, {"scale": 2.0, "softcap": 3.0}])
@pytest.mark.parametrize("at_once", [11, 25, 1 << 23])
def test_both_ways_give_the_gradients_of_the_whole_logits(monkeypatch, how, at_once):
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(heads, "ROWS_AT_ONCE", 1)
    hidden, head = make(**how)
    leaves, weights = (hidden, head.weight, head.bias), torch.arange(1.0, 8.0, dtype=torch.float64)
    expected = -(weights * reference(hidden, head, ENTRIES)).sum()
    wanted = torch.autograd.grad(expected, leaves)
    scores = Scores(hidden, head, ENTRIES)
    for value in (scores.weighted_nll(weights), -(weights * Scores(hidden, head, ENTRIES).logprobs()).sum()):
        torch.testing.assert_close(value, expected)
        for got, want in zip(torch.autograd.grad(value, leaves), wanted, strict=True):
            torch.testing.assert_close(got, want)
    likeliest = head.logits(hidden).argmax(-1)
    assert (scores.correct == (likeliest[ENTRIES.rows] == ENTRIES.targets)).all()


def test_a_vocabulary_of_262144_is_scored_in_bounded_memory():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    torch.manual_seed(0)
    vocabulary, rows = 262_144, 100
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocabulary, 8)
    entries = Entries(torch.arange(rows), torch.randint(vocabulary, (rows,)))
    expected = -torch.cat(
        [
            reference(h, Head(weight), Entries(torch.arange(10), t))
            for h, t in zip(hidden.detach().split(10), entries.targets.split(10), strict=True)
        ]
    ).sum()
    with Watch():
        loss = Scores(hidden, Head(weight), entries).weighted_nll(torch.ones(rows))
        loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert largest <= heads.rows_at_once(vocabulary) * vocabulary < rows * vocabulary


def test_a_head_that_is_not_trained_gets_no_gradient():
    hidden, head = make()
    frozen = Head(head.weight.detach(), None)
    Scores(hidden, frozen, ENTRIES).weighted_nll(torch.ones(7, dtype=torch.float64)).backward()
    assert hidden.grad is not None
    assert frozen.weight.grad is None
