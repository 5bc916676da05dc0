"""Hand-labelled US addresses to JSON: from one line of text to its parts, with the keys that occur.

    python examples/addresses/prepare.py    ->  examples/addresses/data/addresses.jsonl

    {"input": "3600 West 5th Ave", "output": "{\"AddressNumber\": \"3600\", \"StreetNamePreDirectional\": ...}"}

The labels are those of the PyPI package usaddress 0.5.16 (MIT, its notice is copied beside the rows). The package is
fetched once; later runs need no network.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import jsonschema

from tunesmith.errors import InputError
from tunesmith.models.fetch import Member, PackageFile, fetch_members, sha256_of

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "usaddress-0.5.16"
PACKAGE = PackageFile(
    "usaddress",
    "0.5.16",
    "sdist",
    914_927,
    sha256="f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
)
LABELLED = Member("training/labeled.xml", sha256="dbd125fa01fbdbc4e25cce722c648ce4e224e4c9bdb9b5a14498aa8a042aee32")
NOTICE = Member("LICENSE", sha256="151548d98dab9c22d31262ac140388bf818740361438e186028f4193ae86dac0")
# "&" and "PEACE & PLENTY" stand in the file beside "&amp;" and "&#189;": escape those that open no entity.
BARE_AMPERSAND = re.compile(r"&(?!#?\w+;)")


def main() -> int:
    try:
        labelled, notice = fetch()
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    pairs = [pair(element) for element in addresses(labelled.read_text(encoding="utf-8"))]
    rows: dict[str, dict[str, str]] = {}
    disagreeing = 0
    for text, parts in pairs:
        disagreeing += rows.setdefault(text, parts) != parts
    schema = jsonschema.Draft202012Validator(json.loads((HERE / "schema.json").read_text(encoding="utf-8")))
    for parts in rows.values():
        schema.validate(parts)
    out = HERE / "data"
    out.mkdir(exist_ok=True)
    lines = [
        json.dumps({"input": text, "output": json.dumps(parts, ensure_ascii=False)}, ensure_ascii=False)
        for text, parts in rows.items()
    ]
    (out / "addresses.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "LICENSE-usaddress").write_bytes(notice.read_bytes())
    keys = {key for parts in rows.values() for key in parts}
    print(
        f"{len(pairs)} labelled addresses; {len(pairs) - len(rows)} stood there before (the first was kept; "
        f"{disagreeing} of them with other labels); {len(rows)} rows, {len(keys)} keys: {out / 'addresses.jsonl'}"
    )
    return 0


def fetch() -> tuple[Path, Path]:
    """The labelled file and the licence notice, from the cache or out of the package."""
    places = {LABELLED: CACHE / "labeled.xml", NOTICE: CACHE / "LICENSE"}
    if not all(place.is_file() and sha256_of(place) == member.sha256 for member, place in places.items()):
        fetch_members(PACKAGE, places, what="the labelled US addresses")
    return places[LABELLED], places[NOTICE]


def addresses(text: str) -> list[ElementTree.Element]:
    """One element an address, its children the labelled words in order."""
    return ElementTree.fromstring(BARE_AMPERSAND.sub("&amp;", text)).findall("AddressString")


def pair(address: ElementTree.Element) -> tuple[str, dict[str, str]]:
    """(the address as one line, its parts by label in order of appearance).

    Words of one label are joined by spaces; the comma that separates a part from the next is left out of it:
    `<PlaceName>Los</PlaceName> <PlaceName>Osos,</PlaceName>` is `"PlaceName": "Los Osos"`.
    """
    words: dict[str, list[str]] = {}
    for word in address:
        words.setdefault(word.tag, []).append(one_line(word.text or ""))
    parts = {label: " ".join(found).strip(" ,;") for label, found in words.items()}
    return one_line("".join(address.itertext())), {label: part for label, part in parts.items() if part}


def one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
