"""Is a tune as good as the prompt it replaces? Each rule, on measurements made up for it."""

from __future__ import annotations

import pytest
from test_verdict import KEPT, LOST, pair, result

from tunesmith.prove.compression import compare_with_prompt

TUNED, PROMPT = result("tuned", "tuned", 0.5), result("prompt", "prompt", 0.5)
POOR = [result("tuned", "tuned", 0.02), result("prompt", "prompt", 0.03)]


@pytest.mark.parametrize(
    ("results", "found", "retention", "decision", "said"),
    [
        ([TUNED, PROMPT], pair("tuned", "prompt", 0.0, -0.04, 0.04), KEPT, "ship", "equivalent within 5.0 points"),
        ([TUNED, PROMPT], pair("prompt", "tuned", 0.0, -0.04, 0.04), None, "ship", "equivalent within 5.0 points"),
        ([TUNED, PROMPT], pair("tuned", "prompt", 0.3, 0.2, 0.4), KEPT, "ship", "better"),
        ([TUNED, PROMPT], pair("tuned", "prompt", 0.03, -0.02, 0.08), KEPT, "ship", "not worse by 5.0 points"),
        ([TUNED, PROMPT], pair("tuned", "prompt", 0.0, -0.04, 0.04), LOST, "hold", "general behaviour was lost"),
        ([TUNED, PROMPT], pair("tuned", "prompt", -0.03, -0.08, 0.02), KEPT, "hold", "can't be ruled out"),
        ([TUNED, PROMPT], pair("tuned", "prompt", -0.2, -0.3, -0.1), KEPT, "prompt", "keep the prompt"),
        ([TUNED, PROMPT], pair("tuned", "prompt", 0.0, -0.04, 0.04, n=19), KEPT, "too-few-items", "at least 20"),
        # equal on every item says nothing about what 3 in n would do
        ([TUNED, PROMPT], pair("tuned", "prompt", 0.0, 0.0, 0.0, n=40), KEPT, "hold", "can't be ruled out"),
        ([TUNED, PROMPT], pair("tuned", "prompt", 0.0, 0.0, 0.0, n=80), KEPT, "ship", "equivalent"),
        (POOR, pair("tuned", "prompt", -0.01, -0.02, 0.0), KEPT, "hold", "does not do the job"),
    ],
)
def test_the_rules(results, found, retention, decision, said):
    verdict = compare_with_prompt(results, [found], "label", 0.05, 100.0).decide("label", retention)
    assert (verdict.decision, said in verdict.reason) == (decision, True), verdict.reason
    assert verdict.winner == {"ship": "tuned", "prompt": "prompt"}.get(decision)


def test_without_both_of_them_there_is_nothing_to_say():
    assert compare_with_prompt([TUNED], [], "label", 0.05, 100.0) is None
