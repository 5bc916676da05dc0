"""Memory by number of rows: reading, splitting and tokenising short rows, one process a size, without the gate.

    python benchmarks/memory.py                 10,000 and 100,000 rows
    python benchmarks/memory.py 10000 1000000   these sizes

Peak resident memory after each part, less what the process held before the first row. Bytes a row say what grows.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = (10_000, 100_000)
BASE = "smollm2-135m-instruct"


def main() -> None:
    sizes = [int(word) for word in sys.argv[1:]] or list(SIZES)
    print("| rows | read | split | tokenised | bytes a row |")
    print("|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / f"{size}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for i in range(size):
                    row = {"input": f"What is {i} plus {7 * i % 1000}?", "output": f"{i + 7 * i % 1000}"}
                    file.write(json.dumps(row) + "\n")
            words = [sys.executable, __file__, "--measure", str(path)]
            peaks = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
            figures = " | ".join(f"{peak / 1e6:,.0f} MB" for peak in peaks)
            print(f"| {size:,} | {figures} | {peaks[-1] / size:,.0f} |", flush=True)
            path.unlink()


def measure(path: str) -> None:
    """Print the peaks after each part, in bytes above what was held before it began."""
    from tunesmith.chat.renderer import Renderer
    from tunesmith.data.formats import read_examples
    from tunesmith.data.split import split
    from tunesmith.data.tokenize import tokenize
    from tunesmith.models.catalogue import resolve
    from tunesmith.models.loading import load_tokenizer
    from tunesmith.recipe import Recipe

    data = Recipe.of_data(path).data
    renderer = Renderer.from_tokenizer(load_tokenizer(resolve(BASE).folder))
    before, peaks = _peak(), []
    rows = read_examples(data)
    peaks.append(_peak() - before)
    sides = split(rows, 0.1)
    peaks.append(_peak() - before)
    tokenized = tokenize(sides.train, renderer, data, 2048)
    peaks.append(_peak() - before)
    assert tokenized.tokens
    print(json.dumps(peaks))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    else:
        main()
