"""Training speed and memory beside TRL + PEFT, on this machine: `make bench`, or with less patience `--quick`.

Every run is a process of its own, tunesmith and TRL by turns, on the same rows in the same order, from the same
adapter (r=16 on all linears of SmolLM2-135M), with the same optimiser, in float32, 16 rows to a step. TRL runs with its
defaults made to run on a CPU (float32, no checkpointing, 4 rows at a time) and at its best (rows grouped by length too,
so not in the same order); its packing needs a flash-attention GPU kernel: elsewhere packed rows see each other.

    tokens/s   every row counted in full         computed/s   what tunesmith's model really runs
    of peak    the operations that a step's products can't do without (train_runs.needed_flops), a second, over those of
               the best float32 product this machine gives; norms, activations and the interpreter count as overhead
    body       the same of the frozen linears alone; attention, adapters and the head count as overhead too
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from train_sets import SETS

HERE, OUT = Path(__file__).parent, Path(__file__).parent / "out"
LINEAR_WEIGHTS = 30 * (576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536)  # SmolLM2-135M's
LONGEST_LOOK, LOOK_STEPS = "short rows", 20  # where the losses are followed furthest
KINDS = ("tunesmith", "trl", "trl-grouped")


@dataclass(frozen=True)
class Pair:
    """One turn of all the trainers on one set."""

    name: str
    runs: dict[str, dict]
    peak_gflops: float

    def ratio(self, kind: str) -> float:
        return self.runs["tunesmith"]["tokens_per_second"] / self.runs[kind]["tokens_per_second"]

    @property
    def of_peak(self) -> float:
        return self.runs["tunesmith"]["flops_per_second"] / (self.peak_gflops * 1e9)

    @property
    def body_of_peak(self) -> float:
        return self.runs["tunesmith"]["computed_per_second"] * 4 * LINEAR_WEIGHTS / (self.peak_gflops * 1e9)

    @property
    def memory(self) -> float:
        return self.runs["tunesmith"]["peak_bytes"] / self.runs["trl"]["peak_bytes"]

    @property
    def loss_difference(self) -> float:
        losses = zip(self.runs["tunesmith"]["losses"], self.runs["trl"]["losses"], strict=True)
        return max(abs(a - b) for a, b in losses)


def run(kind: str, name: str, adapter: Path, steps: int) -> dict:
    """One process; its last line is its report."""
    command = [sys.executable, str(HERE / "train_runs.py"), kind, name, str(adapter), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{kind} on {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_pair(name: str, adapter: Path, steps: int, trl_steps: int) -> Pair:
    peak = run("peak", name, adapter, 0)["gflops"]
    runs = {}
    for kind in KINDS:
        runs[kind] = run(kind, name, adapter, steps if kind == "tunesmith" else trl_steps)
        print(f"  {name}: {kind} {runs[kind]['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    if steps != trl_steps:
        runs["tunesmith"]["losses"] = runs["tunesmith"]["losses"][:trl_steps]
    return Pair(name, runs, max(peak, run("peak", name, adapter, 0)["gflops"]))


def table(pairs: list[Pair]) -> str:
    lines = [
        "| set | tokens/s | computed/s | of peak | body | TRL | TRL grouped | against TRL | against grouped | memory "
        "| loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for pair in pairs:
        mine, trl, grouped = (pair.runs[kind] for kind in KINDS)
        lines.append(
            f"| {pair.name} | {mine['tokens_per_second']:.0f} | {mine['computed_per_second']:.0f} "
            f"| {pair.of_peak:.0%} | {pair.body_of_peak:.0%} "
            f"| {trl['tokens_per_second']:.0f} | {grouped['tokens_per_second']:.0f} "
            f"| {pair.ratio('trl'):.1f}x | {pair.ratio('trl-grouped'):.1f}x "
            f"| {mine['peak_bytes'] / 1e9:.1f} of {trl['peak_bytes'] / 1e9:.1f} GB, {pair.memory:.0%} "
            f"| {pair.loss_difference:.1e} |"
        )
    return "\n".join(lines)


def losses(pair: Pair) -> str:
    rows = [
        f"{i:>4}  {a:.4f}  {b:.4f}"
        for i, (a, b) in enumerate(zip(pair.runs["tunesmith"]["losses"], pair.runs["trl"]["losses"], strict=True), 1)
    ]
    return "\n".join([f"losses on {pair.name}: step, tunesmith, TRL", *rows])


def machine() -> str:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "trl", "peft"))
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    import torch

    return f"{datetime.date.today()}, {cpu}, {torch.get_num_threads()} threads, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="3 steps a run (about 25 minutes) instead of 20")
    parser.add_argument("--steps", type=int, help="steps a run")
    parser.add_argument("--pairs", type=int, default=1, help="turns on every set")
    parser.add_argument("--set", choices=SETS, action="append", help="only this set; may be repeated")
    chosen = parser.parse_args()
    steps = chosen.steps or (3 if chosen.quick else 20)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "start"
        run("adapter", "", adapter, 0)
        pairs = []
        for name in [*(chosen.set or SETS)] * chosen.pairs:
            trl_steps = max(steps, LOOK_STEPS) if name == LONGEST_LOOK else steps
            pairs.append(run_pair(name, adapter, max(trl_steps, 5), trl_steps))
    longest = max(pairs, key=lambda pair: len(pair.runs["trl"]["losses"]))
    text = "\n\n".join([machine(), table(pairs), losses(longest)])
    OUT.mkdir(exist_ok=True)
    (OUT / "train.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
