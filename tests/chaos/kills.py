"""Kill trainings at random moments, resume them to the end, and hold the result against one that nobody killed.

python tests/chaos/kills.py 50        (`make chaos`) prints 50/50
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos_commands import Command, run, start

from small_jobs import VARIANTS, make_job
from tunesmith.train.checkpoint import list_checkpoints, load_checkpoint

KILLS_A_RUN = 5
TIMES = ("seconds", "peak_memory_bytes")


def moments(chance: random.Random) -> dict[str, Callable[[Command, Path], None]]:
    """What to wait for before the kill."""

    def anywhere(command: Command, folder: Path) -> None:
        command.process.join(chance.uniform(0.0, 3.0))

    def training(command: Command, folder: Path) -> None:
        until(command, lambda: (folder / "metrics.jsonl").exists())
        command.process.join(chance.uniform(0.0, 1.0))

    def writing(command: Command, folder: Path) -> None:
        later = time.monotonic() + chance.uniform(0.0, 1.0)
        until(command, lambda: (folder / "metrics.jsonl").exists())
        until(command, lambda: time.monotonic() > later and any(folder.glob("checkpoints/.step-*.partial")))
        time.sleep(chance.choice((0.0, 0.001, 0.003)))

    def publishing(command: Command, folder: Path) -> None:
        until(command, lambda: (folder / ".adapter.partial").exists() or (folder / ".model.partial").exists())
        time.sleep(chance.choice((0.0, 0.001, 0.005, 0.02)))

    return {"anywhere": anywhere, "training": training, "writing": writing, "publishing": publishing}


def until(command: Command, true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while command.running and not true():
        assert time.monotonic() < limit, f"waited two minutes; it said:\n{command.stderr}"
        time.sleep(0.0002)


def kill_and_resume(recipe: Path, folder: Path, whole: Path, kinds: list[str], chance: random.Random) -> int:
    """Kill a training once at each kind of moment, let it end; how many kills it survived to the byte.

    AssertionError where anything is left that is not whole, or the end is another.
    """
    home, waits, killed = folder.with_name("home"), moments(chance), 0
    for kind in kinds:
        command = start("train", recipe, "--run", folder, "--resume", home=home)
        waits[kind](command, folder)
        command.signal(signal.SIGKILL)
        killed += command.wait() == -signal.SIGKILL
        for path in list_checkpoints(folder / "checkpoints"):
            assert load_checkpoint(path) is not None, f"{path.name} is not whole"
        for name in ("adapter", "model"):
            if (folder / name).exists():
                assert files_of(folder / name) == files_of(whole / name), "half of a result was published"
    status, said = run("train", recipe, "--run", folder, "--resume", home=home)
    assert status == 0, said
    assert_same(folder, whole)
    return killed


def assert_same(folder: Path, whole: Path) -> None:
    """The same result byte for byte, and every step's row once, with the same numbers."""
    for name in ("adapter", "model"):
        assert files_of(folder / name) == files_of(whole / name), f"{name} differs"
    assert rows_of(folder) == rows_of(whole), "metrics.jsonl differs"
    leftovers = [path.name for path in folder.rglob("*.partial")]
    assert not leftovers, leftovers


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def main(wanted: int, seed: int) -> int:
    chance, survived, tried = random.Random(seed), 0, 0
    print(f"seed {seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        wholes = {}
        for variant in VARIANTS:
            recipe, wholes[variant] = make_job(place / "job", variant), place / f"whole-{variant}"
            status, said = run("train", recipe, "--run", wholes[variant], home=place / "home")
            assert status == 0, said
        while tried < wanted:
            variant = chance.choice(list(VARIANTS))
            kinds = [chance.choice(list(moments(chance))) for _ in range(min(KILLS_A_RUN, wanted - tried))]
            folder = place / "killed"
            try:
                killed = kill_and_resume(place / "job" / f"{variant}.yaml", folder, wholes[variant], kinds, chance)
                survived, tried = survived + killed, tried + killed
            except AssertionError as error:
                tried += len(kinds)
                print(f"{variant}, killed while {', '.join(kinds)}: {error}", file=sys.stderr)
            print(f"{survived}/{tried}  {variant}: {', '.join(kinds)}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{survived}/{wanted}")
    return 0 if survived == wanted else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)))
