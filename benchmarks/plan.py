"""How right the plan was: what runs were predicted to take beside what they took, as docs/SCALE.md's table.

    python benchmarks/plan.py runs/*       one line a finished run; exits 1 where one is beyond the goal

Both come from each run's plan.json. Seconds are those of the training steps, so a run that shared its machine says
nothing about them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MEMORY_GOAL, TIME_GOAL = 0.15, 0.25


def main() -> int:
    print("| run | steps | memory: planned | took | error | time: planned | took | error |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    missed = False
    for folder in map(Path, sys.argv[1:]):
        path = folder / "plan.json"
        plan = json.loads(path.read_text()) if path.exists() else {}
        if "actual" not in plan:
            print(f"{folder}: no finished run", file=sys.stderr)
            continue
        predicted, actual = plan["predicted"], plan["actual"]
        memory, seconds = (predicted[key] / actual[key] - 1 for key in ("peak_bytes", "seconds"))
        missed |= abs(memory) > MEMORY_GOAL or abs(seconds) > TIME_GOAL
        print(
            f"| {folder.name} | {actual['steps']} "
            f"| {predicted['peak_bytes'] / 1e9:.2f} GB | {actual['peak_bytes'] / 1e9:.2f} GB | {memory:+.0%} "
            f"| {predicted['seconds']:.0f} s | {actual['seconds']:.0f} s | {seconds:+.0%} |"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
