"""What the data gate costs: `tunesmith check` on 25,000, 50,000 and 100,000 rows of 200 tokens, one process each.

    python benchmarks/gate.py              wall and processor seconds and peak memory of each
    python benchmarks/gate.py 10000 20000  these sizes

The rows are made up: a question and an answer that walk through the word pairs of Python's own documentation, so that
words and pairs are as frequent as in real prose; one row in fifty repeats another with a few words changed, one in
two hundred word for word. On a shared machine the processor's seconds say more than the clock's.
"""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

SIZES = (25_000, 50_000, 100_000)
ASKED, ANSWERED = 75, 27  # words; with the marks of the template 200 tokens of SmolLM2
NEARLY_COPIED, COPIED = 0.02, 0.005
REMEMBERED = 1_000  # rows that a copy may be taken of


def main() -> None:
    sizes = [int(word) for word in sys.argv[1:]] or list(SIZES)
    followers = word_pairs()
    print(f"{'rows':>8} {'MB':>6} {'wall s':>8} {'CPU s':>8} {'peak MB':>8} {'CPU ms/row':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / f"{size}.jsonl"
            write_rows(path, size, followers)
            wall, processor, peak = checked(path)
            megabytes = path.stat().st_size / 1e6
            figures = f"{wall:8.1f} {processor:8.1f} {peak / 1e6:8.0f} {1000 * processor / size:11.3f}"
            print(f"{size:8,} {megabytes:6.0f} {figures}", flush=True)
            path.unlink()


def word_pairs() -> dict[str, list[str]]:
    """For every word of the standard library's docstrings, the words that follow it, as often as they do."""
    followers: dict[str, list[str]] = defaultdict(list)
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                words = (ast.get_docstring(node) or "").split()
                for word, follower in pairwise(words):
                    followers[word].append(follower)
    return followers


def write_rows(path: Path, count: int, followers: dict[str, list[str]]) -> None:
    chance = random.Random(0)
    starts = sorted(followers)
    recent: list[dict[str, str]] = []
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            draw = chance.random()
            if recent and draw < COPIED:
                row = chance.choice(recent)
            elif recent and draw < COPIED + NEARLY_COPIED:
                row = nearly(chance.choice(recent), starts, chance)
            else:
                row = {key: walk(n, starts, followers, chance) for key, n in (("input", ASKED), ("output", ANSWERED))}
            recent = [*recent[-REMEMBERED:], row] if len(recent) < REMEMBERED or draw > 0.9 else recent
            file.write(json.dumps(row) + "\n")


def walk(count: int, starts: list[str], followers: dict[str, list[str]], chance: random.Random) -> str:
    words = [chance.choice(starts)]
    while len(words) < count:
        after = followers.get(words[-1])
        words.append(chance.choice(after or starts))
    return " ".join(words)


def nearly(row: dict[str, str], starts: list[str], chance: random.Random) -> dict[str, str]:
    """The row with three words of its question changed."""
    words = row["input"].split()
    for place in chance.sample(range(len(words)), 3):
        words[place] = chance.choice(starts)
    return {**row, "input": " ".join(words)}


def checked(path: Path) -> tuple[float, float, int]:
    """Wall seconds, processor seconds and peak bytes of `tunesmith check` on a file."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "tunesmith.cli", "check", str(path), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):
        sys.exit(f"tunesmith check ended with status {process.returncode}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


if __name__ == "__main__":
    main()
