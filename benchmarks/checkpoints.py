"""What saving costs beside training, SmolLM2-135M with rank 16: processor time of a step and of a checkpoint.

    python benchmarks/checkpoints.py       a few steps of 16 rows of about 60 tokens, and as many checkpoints

A run of 200 steps saves every 50th and so four times. The processor's time, because a shared machine's clock says
little; the clock's is printed beside it, for a checkpoint also waits for the disk.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tunesmith.data.batches import Layout, StepPlan
from tunesmith.models.loading import load_base
from tunesmith.models.lora import add_new_adapter, wrap
from tunesmith.recipe import Adapter, Train
from tunesmith.train.bodies import make_body
from tunesmith.train.checkpoint import save_checkpoint
from tunesmith.train.loop import Hooks, TrainState, train
from tunesmith.train.losses import sft
from tunesmith.tree.body import prepare
from tunesmith.types import TokenizedExample

BASE, STEPS, RUN_STEPS, RUN_SAVES, GOAL = "smollm2-135m-instruct", 4, 200, 4, 0.02


def main() -> int:
    model = load_base(BASE, device="cpu").model
    lora = wrap(model)
    add_new_adapter(lora, "tuned", Adapter(), seed=0)
    lora.use("tuned")
    prepare(model)
    body, chance = make_body(model, lora, "tuned"), np.random.default_rng(0)
    rows = [
        TokenizedExample(
            str(i), chance.integers(0, 40_000, 60).astype(np.int32), np.array([0.0] * 30 + [1.0] * 30, np.float32)
        )
        for i in range(16 * STEPS)
    ]
    saves, clocks = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:

        def save(state: TrainState) -> None:
            clock, processor = time.perf_counter(), time.process_time()
            save_checkpoint(Path(folder), state)
            saves.append(time.process_time() - processor)
            clocks.append(time.perf_counter() - clock)

        steps = StepPlan(rows, 16, STEPS, 0, True, Layout(2048))
        began = time.process_time()
        hooks = Hooks(on_checkpoint=save)
        train(body, dict(lora.parameters("tuned")), steps, sft, Train(), lr=1e-3, save_every=1, hooks=hooks)
        step = (time.process_time() - began - sum(saves)) / STEPS
    saved = statistics.median(saves)
    share = RUN_SAVES * saved / (RUN_STEPS * step + RUN_SAVES * saved)
    print(
        f"step {step:.2f} s, checkpoint {saved:.2f} s of the processor ({statistics.median(clocks):.2f} s by the clock)"
    )
    print(f"{RUN_SAVES} checkpoints in {RUN_STEPS} steps: {share:.2%} of the time (goal {GOAL:.0%})")
    return int(share > GOAL)


if __name__ == "__main__":
    sys.exit(main())
