"""WordNet 3.0 noun glosses to their lexicographer file: a 24-way classification of short real text.

    python examples/glosses/prepare.py      ->  examples/glosses/data/glosses.jsonl   (1,440 rows, 60 a class)

WordNet comes from Debian's `wordnet-base` (already installed, or fetched with `apt-get download`, which needs no root).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALLED = Path("/usr/share/wordnet/data.noun")
ROWS_A_CLASS = 60
# lexnames(5WN): file number -> name; noun.Tops (03) and noun.motive (16, 42 synsets) are left out
CLASSES = {
    "04": "act", "05": "animal", "06": "artifact", "07": "attribute", "08": "body", "09": "cognition",
    "10": "communication", "11": "event", "12": "feeling", "13": "food", "14": "group", "15": "location",
    "17": "object", "18": "person", "19": "phenomenon", "20": "plant", "21": "possession", "22": "process",
    "23": "quantity", "24": "relation", "25": "shape", "26": "state", "27": "substance", "28": "time",
}  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        nouns, notice = wordnet(Path(scratch))
        by_class = glosses(nouns.read_text(encoding="utf-8"))
        out = HERE / "data"
        out.mkdir(exist_ok=True)
        shutil.copy(notice, out / "WORDNET-LICENSE")
    rows = [
        {"input": gloss, "output": label}
        for label in sorted(by_class)
        for gloss in sorted(by_class[label], key=digest)[:ROWS_A_CLASS]
    ]
    rows.sort(key=lambda row: digest(row["input"]))
    (out / "glosses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows, {len(by_class)} classes: {out / 'glosses.jsonl'}")


def wordnet(scratch: Path) -> tuple[Path, Path]:
    """data.noun and the licence notice, installed or fetched."""
    if INSTALLED.exists():
        return INSTALLED, Path("/usr/share/doc/wordnet-base/copyright")
    print("fetching Debian's wordnet-base (6 MB)", file=sys.stderr)
    try:
        subprocess.run(["apt-get", "download", "-qq", "wordnet-base"], cwd=scratch, check=True)
        subprocess.run(["dpkg-deb", "-x", next(scratch.glob("*.deb")), scratch], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"wordnet-base cannot be fetched ({error}); install it with `apt-get install wordnet-base`")
    return scratch / INSTALLED.relative_to("/"), scratch / "usr/share/doc/wordnet-base/copyright"


def glosses(text: str) -> dict[str, list[str]]:
    """Class -> definitions. A line of data.noun: `offset lex_filenum ss_type ... | definition; "example"`."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in text.splitlines():
        if line.startswith(" "):  # the licence
            continue
        label = CLASSES.get(line.split(" ", 2)[1])
        definition = line.partition(" | ")[2].partition(";")[0].strip()
        if label and 20 <= len(definition) <= 160:
            found[label].add(definition)
    seen_twice = {d for label in found for d in found[label] for other in found if other != label and d in found[other]}
    return {label: sorted(definitions - seen_twice) for label, definitions in found.items()}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
