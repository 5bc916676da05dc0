"""items.jsonl: one row a held-out item and contender, from which everything in the report is computed.

Beside the contract's keys a row carries what slices, pages and macro F1 need (`input`, `expected`, `group`, `slices`,
`label`, `faults`). The first row of a finished file also carries `proof`: the settings, the trials on training rows
and the retention measurements, so that the file alone reproduces the report.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError
from tunesmith.store.runs import write_text


@dataclass(frozen=True, slots=True)
class Row:
    """One answer of one contender. `scores[name]` is None where the item has no expected answer to compare with."""

    item: str
    contender: str
    kind: str  # what the verdict's rules go by: prompt | retrieval | tuned | previous | endpoint | classifier
    prompt_tokens: int
    output: str
    finish_reason: str  # stop | length | error
    scores: dict[str, float | None]
    output_tokens: int
    seconds: float
    input: str = ""
    expected: str | None = None
    group: str = ""
    source: str = ""
    label: str | None = None  # the label read from the output, for label tasks
    slices: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)  # scorer, or "answer", to what went wrong

    def to_line(self, proof: dict[str, Any] | None = None) -> str:
        content = asdict(self) if proof is None else {**asdict(self), "proof": proof}
        return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def read_rows(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """All rows and the `proof` of a finished items.jsonl. Raises InputError with the line at fault."""
    rows: list[Row] = []
    proof: dict[str, Any] | None = None
    known = {each.name for each in fields(Row)}
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # splitlines would cut at U+2028
    except FileNotFoundError:
        raise InputError("there are no items yet; run `tunesmith prove` first", file=path) from None
    except UnicodeDecodeError:
        raise InputError("this file is not UTF-8 text", file=path) from None
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            proof = content.get("proof", proof)
            rows.append(Row(**{key: value for key, value in content.items() if key in known}))
        except (ValueError, TypeError, AttributeError):
            raise InputError("this line is no item row; run `tunesmith prove` again", file=path, line=number) from None
    if not rows or proof is None:
        raise InputError("the proof was not finished; run `tunesmith prove` to continue it", file=path)
    return rows, proof


def write_rows(path: Path, rows: Sequence[Row], proof: dict[str, Any]) -> None:
    """The finished file, whole or not at all."""
    write_text(path, "".join(row.to_line(proof if place == 0 else None) for place, row in enumerate(rows)))
