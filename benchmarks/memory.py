"""Memory by number of rows: reading, splitting, tokenising and the first batches, one process a size, without the gate.

    python benchmarks/memory.py                 10,000, 100,000 and 1,000,000 rows
    python benchmarks/memory.py 10000 1000000   these sizes

Short rows; the token cache is an empty folder each time. Two peaks are sampled every few milliseconds, each less what
the process held before the first row: memory of its own (RssAnon of /proc/self/status), which can't be taken from it,
and all that is resident (VmRSS), with pages of mapped files, which the system drops where it needs room.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SIZES = (10_000, 100_000, 1_000_000)
BASE = "smollm2-135m-instruct"
BATCHES = 100
EVERY = 0.005  # seconds
PARTS = ("read", "split", "tokenise", "batches")


def main() -> None:
    sizes = [int(word) for word in sys.argv[1:]] or list(SIZES)
    print(f"| rows | {' | '.join(PARTS)} | all: own memory | with mapped pages |")
    print("|--:|" + "--:|" * (len(PARTS) + 2))
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / f"{size}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for i in range(size):
                    row = {"input": f"What is {i} plus {7 * i % 1000}?", "output": f"{i + 7 * i % 1000}"}
                    file.write(json.dumps(row) + "\n")
            words = [sys.executable, __file__, "--measure", str(path), str(Path(folder) / f"home {size}")]
            peaks = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
            figures = " | ".join(f"{peak / 1e6:,.0f} MB" for peak in peaks)
            print(f"| {size:,} | {figures} |", flush=True)
            path.unlink()


def measure(path: str, home: str) -> None:
    """Print, in bytes: the peak of own memory in each part, over all of them, and that of all resident memory."""
    from tunesmith.chat.renderer import Renderer
    from tunesmith.data.batches import Layout, StepPlan
    from tunesmith.data.formats import read_examples
    from tunesmith.data.split import split
    from tunesmith.data.tokenize import tokenize
    from tunesmith.models.catalogue import resolve
    from tunesmith.models.loading import load_tokenizer
    from tunesmith.recipe import Recipe

    data = Recipe.of_data(path).data
    renderer = Renderer.from_tokenizer(load_tokenizer(resolve(BASE).folder))
    os.environ["TUNESMITH_HOME"] = home
    peaks = _Peaks()
    rows = read_examples(data)
    peaks.close_part()
    sides = split(rows, 0.1)
    peaks.close_part()
    tokenized = tokenize(sides.train, renderer, data, 2048)
    peaks.close_part()
    plan = StepPlan(tokenized.examples, 16, BATCHES, 0, True, Layout(2048))
    assert all(step.tokens for step in map(plan.__getitem__, range(BATCHES)))
    peaks.close_part()
    print(json.dumps([*peaks.own, max(peaks.own), peaks.resident]))


class _Peaks:
    """Watches this process's memory, in bytes above what it held when it was asked to."""

    def __init__(self) -> None:
        self.own: list[int] = []
        self.resident = 0
        self._before = _held()
        self._part = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def close_part(self) -> None:
        self._look()
        self.own.append(self._part)
        self._part = 0

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(EVERY)

    def _look(self) -> None:
        own, resident = (now - before for now, before in zip(_held(), self._before, strict=True))
        self._part, self.resident = max(self._part, own), max(self.resident, resident)


def _held() -> tuple[int, int]:
    """Own and resident memory now, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    own, resident = (int(facts[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
    return own, resident


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main()
