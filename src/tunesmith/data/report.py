"""What the gate found, as an object, as JSON and on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tunesmith.data import wording
from tunesmith.data.material import Note
from tunesmith.data.split import Split
from tunesmith.recipe import Data
from tunesmith.types import Finding, Source

STYLES = {  # worst first
    "block": "bold red",
    "warn": "yellow",
    "info": "cyan",
}


@dataclass(frozen=True)
class DataReport:
    """The gate's answer: blocking findings first, at most one a rule, reason and file.

    split      the rows on both sides
    counts     rows, distinct inputs, clusters, labels
    shapes     for the page: length histograms and label counts, the largest clusters, a few rows token by token
    removable  rows that a cleaned copy leaves out, each with the rule that says so
    """

    findings: list[Finding]
    split: Split
    train_files: tuple[str, ...]
    counts: dict[str, Any]
    shapes: dict[str, Any] = field(default_factory=dict)
    removable: Mapping[Source, str] = field(default_factory=dict, repr=False)

    @property
    def blocked(self) -> bool:
        """Whether training on this data is refused."""
        return any(finding.severity == "block" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The contract's data_report.json."""
        return {
            "blocked": self.blocked,
            "counts": self.counts,
            "findings": [asdict(finding) for finding in self.findings],
            "shapes": self.shapes,
        }

    def with_notes(self, notes: Iterable[Note]) -> DataReport:
        """The report with what was found later."""
        return replace(self, findings=_worst_first([*self.findings, *(f for note in notes for f in by_file(note))]))

    def summary(self) -> str:
        """`blocked by split-leak; 3 warnings`."""
        rules = dict.fromkeys(finding.rule for finding in self.findings if finding.severity == "block")
        warnings = sum(finding.severity == "warn" for finding in self.findings)
        start = f"blocked by {', '.join(rules)}" if rules else "the data may be trained on"
        return f"{start}; {wording.count(warnings, 'warning')}"

    def render(self) -> Group:
        """For a terminal: counts in a line, findings in a table, the answer in a line."""
        counts = self.counts
        head = Text(
            f"{counts['train']:,} rows to train on, {counts['held_out']:,} held out; "
            f"{counts['distinct_inputs']:,} distinct inputs in {counts['near_duplicate_clusters']:,} clusters"
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("", "rule", "where", "what, and what to do"):
            table.add_column(column, overflow="fold")
        for finding in self.findings:
            told = Text(finding.reason + ".\n").append(f"→ {finding.remedy}.", style="dim")
            style = STYLES[finding.severity]
            table.add_row(Text(finding.severity, style=style), finding.rule, Text(place(finding)), told)
        return Group(head, table, Text(self.summary(), style=STYLES["block"] if self.blocked else "bold green"))


def place(finding: Finding) -> str:
    """`rows.jsonl lines 3, 7 and 12 more`."""
    if finding.file is None:
        return ""
    name = finding.file.rsplit("/", 1)[-1]
    return f"{name} {wording.lines(finding.lines)}" if finding.lines else name


def make_report(
    rows: Split,
    data: Data,
    faults: Iterable[Finding],
    notes: Iterable[Note],
    counts: dict[str, Any],
    shapes: dict[str, Any],
) -> DataReport:
    """Merge what was met in reading with what the rules said, worst first."""
    findings: list[Finding] = []
    removable: dict[Source, str] = {}
    for fault in merge(faults):
        findings.append(fault)
        removable |= {Source(fault.file or "", line): fault.rule for line in fault.lines}
    for note in notes:
        findings.extend(by_file(note))
        for source in note.remove:
            removable.setdefault(source, note.rule)
    train_files = tuple(file.path for file in data.train_files)
    return DataReport(_worst_first(findings), rows, train_files, counts, shapes, removable)


def _worst_first(findings: Iterable[Finding]) -> list[Finding]:
    severities = [*STYLES]
    return sorted(findings, key=lambda finding: severities.index(finding.severity))


def merge(faults: Iterable[Finding]) -> list[Finding]:
    """One finding a rule, reason and file, with all its lines. Reasons that only name other values are one."""
    merged: dict[tuple[str, str | None], list[Finding]] = {}
    for fault in faults:
        merged.setdefault((fault.rule, fault.file), []).append(fault)
    findings = []
    for (rule, file), group in merged.items():
        first, lines = group[0], tuple(line for fault in group for line in fault.lines)
        more = f" (and {len(group) - 1:,} more rows)" if len(group) > 1 else ""
        findings.append(Finding(rule, first.severity, first.reason + more, first.remedy, file, lines))
    return findings


def by_file(note: Note) -> list[Finding]:
    """A note as one finding for each file that its rows come from."""
    lines: dict[str | None, list[int]] = {} if note.sources else {None: []}
    for source in note.sources:
        lines.setdefault(source.file, []).append(source.line)
    return [
        Finding(note.rule, note.severity, note.reason, note.remedy, file, tuple(sorted(set(numbers))))
        for file, numbers in lines.items()
    ]
