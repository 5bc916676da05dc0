"""The Python language reference as plain texts, out of the Python that runs this: no network.

    python examples/pydoc/prepare.py    ->  examples/pydoc/data/topics.jsonl

    {"text": "The assert statement ..."}

They are the topics of `help()`: 79 of them in Python 3.11, 465,000 characters (PSF licence).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data import topics

DATA = Path(__file__).resolve().parent / "data"


def main() -> int:
    DATA.mkdir(exist_ok=True)
    texts = [text.strip() for _, text in sorted(topics.topics.items())]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (DATA / "topics.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(texts)} topics, {sum(map(len, texts)):,} characters: {DATA / 'topics.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
