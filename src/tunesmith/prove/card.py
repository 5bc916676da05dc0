"""adapter/README.md: the model card, with the evidence in its front matter for programs and in its text for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tunesmith.prove.measures import interval_json
from tunesmith.prove.report import Report
from tunesmith.prove.terminal import faults, with_interval
from tunesmith.prove.verdict import points, title
from tunesmith.store.runs import Run, read_json, write_text

HASHES = ("recipe_hash", "data_hash", "split_hash", "base_weights_hash", "chat_template_hash")


def write_card(run: Run, report: Report, *, license: str | None = None) -> Path:
    """Write README.md into the run's `adapter/` (or `model/`). `license` is the base's, where it is known."""
    path = run.tuned() / "README.md"
    write_text(path, render_card(report, run.name, read_json(run.lineage), license=license))
    return path


def render_card(report: Report, name: str, lineage: Mapping[str, Any], *, license: str | None = None) -> str:
    """The card's text: YAML front matter (Hugging Face's keys and `evidence`), then prose and the ladder."""
    front: dict[str, Any] = {"base_model": lineage.get("base"), "library_name": "peft"}
    if license is not None:
        front["license"] = license
    front |= {"tags": ["tunesmith", "lora"], "evidence": _evidence(report, lineage)}
    rows = [
        f"| {_plain(each.name)} | {with_interval(each.scores[report.scorer])} | {each.items} "
        f"| {each.prompt_tokens_mean:.0f} | {each.seconds_per_item:.3f} | {', '.join(faults(each))} |"
        for each in report.results
    ]
    verdict = report.verdict
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(name)}",
        f"An adapter for `{_plain(str(lineage.get('base')))}`, trained and measured by tunesmith.",
        f"**Verdict: {verdict.decision}.** {_plain(verdict.reason)}.",
        f"{title(report.scorer)} out of 100 on {report.proof['held_out']} held-out items, with 95% intervals:",
        "| contender | score | items | prompt tokens | seconds an item | notes |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows),
        _retention(report),
        _use(name, lineage),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _evidence(report: Report, lineage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hashes": {key: lineage[key] for key in HASHES if key in lineage},
        "held_out_items": report.proof["held_out"],
        "scorer": report.scorer,
        "scores": {each.name: interval_json(each.scores[report.scorer]) for each in report.results},
        "minimum_detectable_effect": report.minimum_detectable_effect,
        "retention_kept": None if report.retention is None else report.retention["kept"],
        "verdict": report.verdict.to_json(),
    }


def _retention(report: Report) -> str:
    if report.retention is None:
        return "General behaviour was not measured."
    kept = report.retention
    what = "was lost" if not kept["kept"] else "moved" if kept["moved"] else "is kept"
    drift, ratio = kept["drift"], kept["perplexity"]["ratio"]
    return (
        f"General behaviour {what}: drift {drift['mean']:.3f} nats a token on "
        f"{kept['prompts']} general prompts, perplexity of prose {ratio['mean']:.2f} times the base's. "
        f"Answers that stop within 48 tokens: {points(kept['stop_rate']['base'])}% before, "
        f"{points(kept['stop_rate']['tuned'])}% after."
    )


def _use(name: str, lineage: Mapping[str, Any]) -> str:
    base = _plain(str(lineage.get("base")))
    return (
        "## Use\n\n```sh\ntunesmith chat path/to/this/folder\n```\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n```\n\n'
        "Prompts must be rendered by the chat template whose hash stands above; "
        "the base's weights must have the hash that stands above."
    )


def _plain(text: str) -> str:
    """Markup in a name stays text, on one line."""
    return "".join(f"\\{character}" if character in "\\`*|<>[]" else character for character in " ".join(text.split()))
