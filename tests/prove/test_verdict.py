"""Each rule of the verdict, on measurements made up for it."""

from __future__ import annotations

import pytest

from tunesmith.prove.measures import Paired, Result
from tunesmith.prove.verdict import decide, find_pair
from tunesmith.types import Interval


def result(name, kind, mean, unanswered=0, n=145):
    scores = {"label": Interval(mean, (mean - 0.05, mean + 0.05), n)}
    return Result(name, kind, scores, n, 10, 10, 0.1, None, 1.0, 0, unanswered, 0, 0)


def pair(a, b, diff, low, high, p=0.001, n=145, effect=0.1):
    return Paired(a, b, "label", diff, (low, high), p, p, n, n, effect)


TUNED, PROMPT = result("tuned", "tuned", 0.8), result("prompt", "prompt", 0.5)
CLEAR = pair("tuned", "prompt", 0.3, 0.2, 0.4)
LOST = {"kept": False, "reasons": ["drift 4.00 nats a token, above 3.0"]}
MOVED = {"kept": True, "reasons": [], "moved": ["drift 2.00 nats a token, above 1.5"]}
KEPT = {"kept": True, "reasons": [], "moved": []}


@pytest.mark.parametrize(
    ("results", "pairs", "retention", "decision", "winner", "said"),
    [
        ([PROMPT, TUNED], [CLEAR], KEPT, "ship", "tuned", "by 30.0 points of accuracy (20.0 to 40.0, n = 145)"),
        ([PROMPT, TUNED], [CLEAR], None, "ship", "tuned", "beats the best alternative, prompt"),
        ([PROMPT, TUNED], [CLEAR], LOST, "hold", None, "general behaviour was lost: drift 4.00"),
        ([PROMPT, TUNED], [CLEAR], MOVED, "ship", "tuned", "for this task alone: general behaviour moved (drift 2"),
        ([PROMPT, TUNED], [pair("tuned", "prompt", 0.3, 0.2, 0.4, n=19)], KEPT, "too-few-items", None, "at least 20"),
        # a real gain too small to pay, a loss, and a difference too small to matter
        ([PROMPT, TUNED], [pair("tuned", "prompt", 0.015, 0.01, 0.02)], KEPT, "prompt", "prompt", "gains less than 5"),
        ([PROMPT, TUNED], [pair("tuned", "prompt", -0.1, -0.2, -0.03)], KEPT, "prompt", "prompt", "prompt beats tuned"),
        ([PROMPT, TUNED], [pair("tuned", "prompt", 0.0, -0.03, 0.03, 1.0)], KEPT, "prompt", "prompt", "does not pay"),
        # undecided: with enough items it holds, with a blunt comparison it asks for more
        ([PROMPT, TUNED], [pair("tuned", "prompt", 0.04, -0.03, 0.11, 0.2)], KEPT, "hold", None, "undecided"),
        ([PROMPT, TUNED], [pair("tuned", "prompt", 0.1, -0.1, 0.3, 0.2, 40, 0.28)], KEPT, "too-few-items", None, "1,2"),
        # an interval above 0 is not enough where Holm's correction says otherwise
        ([PROMPT, TUNED], [pair("tuned", "prompt", 0.08, 0.01, 0.15, 0.2)], KEPT, "hold", None, "undecided"),
        # the strongest alternative counts, whatever it is
        (
            [PROMPT, result("retrieval", "retrieval", 0.9), TUNED],
            [CLEAR, pair("tuned", "retrieval", -0.1, -0.15, -0.05)],
            KEPT, "retrieve", "retrieval", "retrieval beats tuned",
        ),
        (
            [PROMPT, result("tfidf", "classifier", 0.85), TUNED],
            [CLEAR, pair("tuned", "tfidf", -0.05, -0.1, 0.0)],
            KEPT, "hold", "tfidf", "needs no language model",
        ),
        # nobody does the job
        (
            [result("prompt", "prompt", 0.0), result("tuned", "tuned", 0.06)],
            [pair("tuned", "prompt", 0.06, 0.03, 0.1)],
            KEPT, "hold", None, "no contender does the job",
        ),
        # an earlier adapter that is as good holds the new one back; a worse one does not
        (
            [PROMPT, TUNED, result("runs/old", "previous", 0.82)],
            [CLEAR, pair("tuned", "runs/old", -0.02, -0.06, 0.02)],
            KEPT, "hold", "runs/old", "but not the earlier runs/old",
        ),
        (
            [PROMPT, TUNED, result("runs/old", "previous", 0.6)],
            [CLEAR, pair("runs/old", "tuned", -0.2, -0.3, -0.1)],
            KEPT, "ship", "tuned", "beats",
        ),
        # an endpoint that leads is told, and stops nothing
        (
            [PROMPT, TUNED, result("big@http://x/v1", "endpoint", 0.95)],
            [CLEAR, pair("tuned", "big@http://x/v1", -0.15, -0.2, -0.1)],
            KEPT, "ship", "tuned", "the endpoint big@http://x/v1 is ahead by 15.0",
        ),
        # missing answers
        ([PROMPT, result("tuned", "tuned", 0.8, unanswered=20)], [CLEAR], KEPT, "hold", None, "20 of 145 items"),
        (
            [PROMPT, result("few_shot", "prompt", 0.9, unanswered=30), TUNED],
            [CLEAR, pair("tuned", "few_shot", -0.1, -0.2, -0.05)],
            KEPT, "ship", "tuned", "prompt",
        ),
        # nothing to compare with
        ([TUNED], [], KEPT, "hold", None, "no alternative"),
        ([PROMPT], [], None, "hold", None, "no tuned model"),
        ([result("tuned", "tuned", float("nan"), n=0)], [], None, "too-few-items", None, "no item could be scored"),
    ],
)  # fmt: skip
def test_the_rules(results, pairs, retention, decision, winner, said):
    verdict = decide(results, pairs, "label", retention)
    assert (verdict.decision, verdict.winner) == (decision, winner)
    assert said in verdict.reason
    assert not verdict.reason.endswith(".")


def test_another_tuned_arm_is_named_only_where_it_is_better():
    both = result("tuned+retrieval", "tuned", 0.85)
    pairs = [CLEAR, pair("tuned+retrieval", "prompt", 0.35, 0.25, 0.45)]
    level = [*pairs, pair("tuned", "tuned+retrieval", -0.05, -0.11, 0.01)]
    ahead = [*pairs, pair("tuned", "tuned+retrieval", -0.05, -0.09, -0.01)]
    assert decide([PROMPT, TUNED, both], level, "label", KEPT).winner == "tuned"
    assert decide([PROMPT, TUNED, both], ahead, "label", KEPT).winner == "tuned+retrieval"


def test_a_pair_is_found_either_way_round():
    turned = find_pair([CLEAR], "prompt", "tuned")
    assert turned is not None
    assert (turned.diff, turned.ci) == (-0.3, (-0.4, -0.2))
    assert find_pair([CLEAR], "a", "b") is None
