"""Preference pairs out of the addresses: the right JSON, and the same JSON with one part under a neighbour's key.

python examples/addresses/prepare.py && python examples/addresses/pairs.py    ->  examples/addresses/data/pairs.jsonl

{"prompt": "3600 West 5th Ave", "chosen": "{... \"StreetName\": \"5th\" ...}", "rejected": "{... \"PlaceName\": ...}"}
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
# Keys that a model takes for one another.
MISTAKEN = {
    "StreetName": "PlaceName",
    "PlaceName": "StreetName",
    "StreetNamePreDirectional": "StreetNamePostDirectional",
    "StreetNamePostDirectional": "StreetNamePreDirectional",
    "StreetNamePostType": "StreetNamePreType",
    "StreetNamePreType": "StreetNamePostType",
    "OccupancyIdentifier": "AddressNumber",
    "AddressNumber": "OccupancyIdentifier",
    "LandmarkName": "BuildingName",
    "BuildingName": "LandmarkName",
    "Recipient": "BuildingName",
}


def main() -> int:
    rows = DATA / "addresses.jsonl"
    if not rows.is_file():
        print(f"{rows}: there are no addresses yet; run examples/addresses/prepare.py first", file=sys.stderr)
        return 2
    choose, pairs = random.Random(0), []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        wrong = misplaced(json.loads(row["output"]), choose)
        if wrong is not None:
            rejected = json.dumps(wrong, ensure_ascii=False)
            pairs.append({"prompt": row["input"], "chosen": row["output"], "rejected": rejected})
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (DATA / "pairs.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(pairs)} pairs: {DATA / 'pairs.jsonl'}")
    return 0


def misplaced(parts: dict[str, str], choose: random.Random) -> dict[str, str] | None:
    """One part under a key that the address doesn't have; None where no key of it is easily mistaken."""
    able = [key for key in parts if key in MISTAKEN and MISTAKEN[key] not in parts]
    if not able:
        return None
    wrong = choose.choice(able)
    return {MISTAKEN[key] if key == wrong else key: part for key, part in parts.items()}


if __name__ == "__main__":
    sys.exit(main())
