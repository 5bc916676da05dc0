"""The report on a terminal: the ladder as a table, the verdict in a sentence, three items with every answer."""

from __future__ import annotations

from typing import Any

from tunesmith.prove.measures import Result, by_contender
from tunesmith.prove.report import Report
from tunesmith.prove.verdict import points, title
from tunesmith.types import Interval

ITEMS_SHOWN = 3
CHARACTERS_SHOWN = 240
COLOURS = {"ship": "green", "prompt": "yellow", "retrieve": "yellow", "hold": "red", "too-few-items": "magenta"}


def render(report: Report) -> Any:
    """A rich renderable."""
    from rich.console import Group
    from rich.text import Text

    verdict = report.verdict
    decision = Text(verdict.decision, style=f"bold {COLOURS[verdict.decision]}")
    sentence = Text.assemble("verdict: ", decision, f". {verdict.reason}.")
    return Group(ladder_table(report), Text(), sentence, Text(), *_items(report))


def ladder_table(report: Report) -> Any:
    """One line a contender: the main scorer with its interval, the other scorers, tokens, time."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=None, header_style="bold")
    others = [name for name in report.results[0].scores if name != report.scorer]
    table.add_column("contender", no_wrap=True)  # where room is short, the other headings take two lines
    table.add_column(f"{title(report.scorer)} (95%)", justify="right", no_wrap=True)
    for name in others:
        table.add_column(title(name), justify="right", overflow="fold")
    for heading in ("stopped", "prompt tok", "answer tok", "s/item", "n"):
        table.add_column(heading, justify="right", no_wrap=heading == "n")
    winner = report.verdict.winner
    for each in report.results:
        style = "bold" if each.name == winner else ""
        cells = (each.name, with_interval(each.scores[report.scorer]), *(short(each.scores[name]) for name in others))
        table.add_row(*cells, *_costs(each, report), style=style)
    return table


def with_interval(interval: Interval) -> str:
    """81.2 (77.0 to 85.1)"""
    if not interval.n:
        return "-"
    low, high = interval.ci
    return f"{points(interval.mean)} ({points(low)} to {points(high)})"


def short(interval: Interval) -> str:
    """81.2"""
    return points(interval.mean) if interval.n else "-"


def faults(each: Result) -> list[str]:
    """What must be said about a contender's items beside its scores."""
    said = []
    if each.unanswered:
        said.append(f"{each.unanswered} unanswered, counted as 0")
    if each.empty:
        said.append(f"{each.empty} empty answers")
    if each.scorer_faults:
        said.append(f"{each.scorer_faults} answers a scorer failed on, counted as 0")
    if each.no_expected:
        said.append(f"{each.no_expected} items without an expected answer")
    return said


def _costs(each: Result, report: Report) -> tuple[str, ...]:
    held_out = report.proof["held_out"]
    measured = str(each.items) if each.items == held_out else f"{each.items} of {held_out}"
    return (
        f"{100 * each.stop_rate:.0f}%",
        f"{each.prompt_tokens_mean:.0f}",
        f"{each.output_tokens_mean:.0f}",
        f"{each.seconds_per_item:.2f}",
        measured,
    )


def _items(report: Report) -> list[Any]:
    """Items every contender answered, spread over the file."""
    from rich.padding import Padding
    from rich.text import Text

    shown: list[Any] = []
    grouped = by_contender(report.rows)
    common = set.intersection(*({row.item for row in rows} for rows in grouped.values()))
    first = [row for row in next(iter(grouped.values())) if row.item in common]
    for row in first[:: max(1, len(first) // ITEMS_SHOWN)][:ITEMS_SHOWN]:
        shown.append(Text.assemble(("item  ", "dim"), _cut(row.input)))
        answers = Text.assemble(("expected  ", "bold"), _cut(row.expected or "-"))
        for name, rows in grouped.items():
            answer = next(each for each in rows if each.item == row.item)
            score = answer.scores[report.scorer]
            mark = "" if score is None else f" {points(score)}"
            answers.append_text(Text.assemble("\n", (f"{name}{mark}  ", "bold"), _cut(answer.output)))
        shown += [Padding(answers, (0, 0, 1, 2))]
    notes = [f"{each.name}: {', '.join(said)}" for each in report.results if (said := faults(each))]
    return [*shown, *(Text(note, style="dim") for note in notes)]


def _cut(text: str) -> str:
    """One line, and not an essay. Control characters would reach the terminal."""
    line = "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
    return line if len(line) <= CHARACTERS_SHOWN else line[: CHARACTERS_SHOWN - 1] + "…"
