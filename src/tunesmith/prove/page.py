"""report.html: one self-contained page. All that comes from data is escaped; only the page's own script may run."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tunesmith.prove import pictures
from tunesmith.prove.data_section import data_section
from tunesmith.prove.differences import marked
from tunesmith.prove.measures import Result, by_contender
from tunesmith.prove.report import Report
from tunesmith.prove.retention import general_prompt
from tunesmith.prove.rows import Row
from tunesmith.prove.terminal import faults
from tunesmith.prove.verdict import best_alternative, best_tuned, find_pair, points, title
from tunesmith.store.runs import Run, read_json, read_metrics, write_text

PARTS = Path(__file__).parent / "page"
LARGEST_ITEMS = 2_000_000  # characters of rendered items, so that the page stays under 3 MB
SHOWN_ANSWER = 1500
HEADLINES = {
    "ship": "Ship the tuned model",
    "prompt": "Keep prompting",
    "retrieve": "Use retrieval",
    "hold": "Hold",
    "too-few-items": "Too few items to say",
}


def write_page(run: Run, report: Report) -> Path:
    """Write the run's report.html from the report and whatever else lies in its folder."""
    write_text(run.page, render_page(run, report))
    return run.page


def render_page(run: Run, report: Report) -> str:
    """The page as a string."""
    script = (PARTS / "page.js").read_text("utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return fill(
        "page.html.jinja",
        report=report,
        name=run.name,
        script=Markup(script),
        script_hash=allowed,
        headline=HEADLINES[report.verdict.decision],
        **_headline_figures(report),
        ladder=_ladder(report),
        faults={each.name: faults(each) for each in report.results},
        priced=any(each.cost_per_1k is not None for each in report.results),
        curve=_curve(run),
        slices=_slices(report),
        **_items(report),
        retention_examples=_retention_examples(report),
        data=data_section(_optional(run.data_report)),
        lineage=_flat(_optional(run.lineage)),
        recipe=run.recipe.read_text("utf-8") if run.recipe.is_file() else "",
    )


def fill(template: str, **values: Any) -> str:
    """A template of the page folder with values, all of them escaped that aren't Markup."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PARTS), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"points": points, "title_of": title, "number": _number}
    style = Markup((PARTS / "page.css").read_text("utf-8"))
    return environment.get_template(template).render(style=style, **values)


def _headline_figures(report: Report) -> dict[str, Any]:
    tuned = best_tuned(report.results, report.pairs, report.scorer)
    alternative = best_alternative(report.results, report.scorer)
    pair = find_pair(report.pairs, tuned.name, alternative.name) if tuned and alternative else None
    return {"tuned": tuned, "alternative": alternative, "pair": pair}


def _ladder(report: Report) -> Markup:
    rungs = []
    for each in sorted(report.results, key=lambda each: -_mean(each, report.scorer)):
        interval = each.scores[report.scorer]
        early = "" if each.items == report.proof["held_out"] else f", n = {each.items}"
        rungs.append(
            pictures.Rung(
                each.name,
                interval.mean if interval.n else None,
                *(interval.ci if interval.n else (0.0, 0.0)),
                note=f"{points(interval.ci[0])} – {points(interval.ci[1])}{early}" if interval.n else "",
                tone="winner" if each.name == report.verdict.winner else each.kind,
            )
        )
    return pictures.ladder(rungs, f"{title(report.scorer)} of every contender")


def _mean(each: Result, scorer: str) -> float:
    return each.scores[scorer].mean if each.scores[scorer].n else -1.0


def _curve(run: Run) -> Markup:
    rows = read_metrics(run)
    series = [
        ("training loss", "quiet", [(row["step"], row["loss"]) for row in rows if "loss" in row]),
        ("held-out loss", "strong", [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]),
    ]
    return pictures.curve([each for each in series if each[2]], "Loss", "step")


def _slices(report: Report) -> list[dict[str, Any]]:
    """Slices with their difference as a picture, the worst first."""
    compared = sorted((each for each in report.slices if "diff" in each), key=lambda each: each["diff"])
    reach = max((abs(end) for each in compared for end in each["ci"]), default=1.0) or 1.0
    return [
        {**each, "picture": pictures.difference(each["diff"], each["ci"][0], each["ci"][1], reach)} for each in compared
    ]


def _items(report: Report) -> dict[str, Any]:
    """Items side by side, as many as the page has room for, with the tags that filters go by."""
    grouped = {name: {row.item: row for row in rows} for name, rows in by_contender(report.rows).items()}
    tuned = best_tuned(report.results, report.pairs, report.scorer)
    alternative = best_alternative(report.results, report.scorer)
    found: list[dict[str, Any]] = []
    size = 0
    order = list(dict.fromkeys(row.item for row in report.rows))
    for item in order:
        rows = [rows[item] for rows in grouped.values() if item in rows]
        entry = _item(rows, report.scorer, tuned.name if tuned else "", alternative.name if alternative else "")
        size += sum(len(answer["html"]) + 200 for answer in entry["answers"]) + len(entry["question"]) + 400
        if size > LARGEST_ITEMS:
            break
        found.append(entry)
    return {"items": found, "items_left_out": len(order) - len(found), "contenders": list(grouped)}


def _item(rows: Sequence[Row], scorer: str, tuned: str, alternative: str) -> dict[str, Any]:
    first = rows[0]
    scores = {row.contender: row.scores[scorer] for row in rows}
    mine, theirs = scores.get(tuned), scores.get(alternative)
    tags = []
    if mine is not None and theirs is not None:
        tags += ["win"] if mine > theirs else ["loss"] if mine < theirs else []
    if all(score is None or score < 1 for score in scores.values()):
        tags.append("nobody")
    if any(row.faults for row in rows):
        tags.append("fault")
    return {
        "id": first.item,
        "source": first.source,
        "question": first.input[:SHOWN_ANSWER],
        "expected": None if first.expected is None else first.expected[:SHOWN_ANSWER],
        "tags": " ".join(tags),
        "slices": first.slices,
        "scores": scores,
        "answers": [
            {
                "name": row.contender,
                "score": row.scores[scorer],
                "html": marked(row.output[:SHOWN_ANSWER], first.expected),
                "cut": len(row.output) > SHOWN_ANSWER,
                "length": len(row.output),
                "finish": row.finish_reason,
                "faults": row.faults,
            }
            for row in rows
        ],
    }


def _retention_examples(report: Report) -> list[dict[str, str]]:
    """The three general prompts whose answers drifted most, and what both models said."""
    measured = report.proof["retention"]
    if measured is None:
        return []
    worst = sorted(measured["prompts"], key=lambda each: -each["drift"])[:3]
    return [
        {"prompt": general_prompt(each["prompt"]), "base": each["base_answer"], "tuned": each["tuned_answer"]}
        for each in worst
    ]


def _optional(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, value) lines."""
    lines: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return lines


def _number(value: float | None, digits: int = 2) -> str:
    """1,234.50, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"
