"""The page and the card: whole, offline, small, and deaf to what data would like it to do."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from tunesmith.prove.card import render_card, write_card
from tunesmith.prove.data_section import data_section
from tunesmith.prove.differences import marked
from tunesmith.prove.page import render_page, write_page
from tunesmith.prove.pictures import Rung, curve, ladder
from tunesmith.prove.report import build_report
from tunesmith.prove.rows import Row
from tunesmith.store.runs import Run, write_json

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></details><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "</style><style>*{display:none}</style>",
    "{{ 7 * 191 }}{% for x in y %}",
    "]]><!--",
    "\u2028\x00\x1b[31mred",
]
PROOF = {
    "scorer": "exact_match",
    "scorers": [{"name": "exact_match", "about": HOSTILE[0]}],
    "held_out": 30,
    "task": "text",
    "max_new_tokens": 32,
    "stop_early": True,
    "choices": [{"contender": "prompt", "chosen": HOSTILE[1], "tried": [{"variant": "a", "mean": 0.5, "n": 8}]}],
    "retention": None,
    "prices": {
        "per_hour": 1.5,
        "per_million_prompt_tokens": None,
        "per_million_output_tokens": None,
        "currency": "EUR",
    },
    "training_seconds": 120.0,
}


def make_report(n=30, text=None, proof=None):
    rows = []
    for contender, kind in ((HOSTILE[0], "prompt"), ("tuned", "tuned")):
        for i in range(n):
            hostile = text or HOSTILE[i % len(HOSTILE)]
            right = 1.0 if kind == "tuned" else float(i % 3 == 0)
            rows.append(
                Row(
                    item=f"{i:x}",
                    contender=contender,
                    kind=kind,
                    prompt_tokens=20,
                    output=hostile,
                    finish_reason="stop",
                    scores={"exact_match": right},
                    output_tokens=9,
                    seconds=0.2,
                    input=hostile,
                    expected=hostile[::-1],
                    group=str(i),
                    source=f"{HOSTILE[2]} line {i}",
                    slices={HOSTILE[0]: HOSTILE[i % 2]},
                    faults={"answer": HOSTILE[0]} if i == 1 and kind == "prompt" else {},
                )
            )
    return build_report(rows, {**PROOF, "held_out": n, **(proof or {})})


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "x<b>y")
    run.folder.mkdir()
    (run.folder / "adapter").mkdir()
    run.metrics.write_text(
        "".join(json.dumps({"step": i, "loss": 2 / i, "held_out_loss": 3 / i}) + "\n" for i in range(1, 9))
    )
    write_json(run.lineage, {"base": HOSTILE[0], "recipe_hash": "ab", "packages": {"torch": "2"}})
    finding = {
        "rule": HOSTILE[0],
        "severity": "warn",
        "reason": HOSTILE[1],
        "remedy": "x",
        "file": HOSTILE[2],
        "lines": [1],
    }
    write_json(run.data_report, {"findings": [finding]})
    run.recipe.write_text(f"name: '{HOSTILE[0]}'")
    return run


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    VOID = frozenset({"meta", "input", "br", "img", "link", "line", "circle", "polyline"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_nothing_from_data_becomes_markup(run):
    page = render_page(run, make_report())
    parsed = Tags(page)
    assert parsed.open == []
    assert parsed.tags.count("script") == 1
    assert parsed.tags.count("style") == 1
    assert "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "1337" not in page
    assert "7 * 191" in page


def test_only_the_pages_own_script_may_run(run):
    page = render_page(run, make_report())
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_the_page_reaches_for_nothing(run):
    page = render_page(run, make_report())
    parsed = Tags(page)
    for name, value in parsed.attributes:
        if name in ("src", "href", "action", "srcset"):
            assert (value or "").startswith("#"), (name, value)
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_stays_small_however_long_the_answers(run):
    report = make_report(n=1500, text="long & <b>words</b> " * 300)
    path = write_page(run, report)
    assert path.stat().st_size < 3_000_000
    assert "more items are in items.jsonl" in path.read_text()


def test_verdict_ladder_answers_and_the_rest_are_there(run):
    page = render_page(run, make_report())
    for words in (
        "Ship the tuned model",
        "The ladder",
        "What a call costs",
        "How it learned",
        "side by side",
        "What the data gate found",
        "How this was measured",
        "Lineage",
        "EUR per 1,000 calls",
        "<svg",
    ):
        assert words in page
    assert page.count("<details") >= 30
    assert 'lang="en"' in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_a_bare_folder_is_enough(tmp_path):
    page = render_page(Run(tmp_path), make_report())
    assert "How it learned" not in page
    assert "The ladder" in page


def test_the_same_report_gives_the_same_bytes(run):
    assert render_page(run, make_report()) == render_page(run, make_report())


def test_differences_are_marked_word_by_word():
    assert str(marked("a new cat", "a old cat")) == "a <del>old</del><ins>new</ins> cat"
    assert str(marked("<b>", None)) == "&lt;b&gt;"
    assert str(marked("wholly other", "nothing alike here")) == "wholly other"
    assert len(marked("word " * 5000, "word " * 5000)) < 30_000


def test_pictures_survive_empty_and_odd_values():
    assert "nothing could be scored" in ladder([Rung("a", None, 0, 0, "", "prompt")], "x")
    assert curve([("loss", "quiet", [(1.0, 2.0)])], "Loss", "step") == ""
    assert "nan" not in curve([("loss", "quiet", [(1.0, 2.0), (2.0, float("nan")), (3.0, 1.0)])], "Loss", "step")
    assert "<svg" in curve([("loss", "quiet", [(1.0, 0.0), (2.0, 0.0)])], "Loss", "step")


def test_the_card_holds_the_evidence(run):
    report = make_report()
    path = write_card(run, report, license="apache-2.0")
    _, front, body = path.read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["library_name"] == "peft"
    assert facts["license"] == "apache-2.0"
    assert facts["evidence"]["hashes"] == {"recipe_hash": "ab"}
    assert facts["evidence"]["scores"]["tuned"]["ci"] == list(report.result("tuned").scores["exact_match"].ci)
    assert facts["evidence"]["verdict"]["decision"] == "ship"
    assert "<script>" not in body
    assert "**Verdict: ship.**" in body
    assert "license" not in yaml.safe_load(render_card(report, "x", {}).split("---\n")[1])


def hostile_data_report():
    """A data report as the gate writes it, with hostile text wherever text from the data may stand."""
    lengths = [
        {"side": side, "from": 10 * i, "to": 10 * i + 10, "rows": i} for side in ("train", "held out") for i in (0, 1)
    ]
    labels = [{"label": text[:40], "side": "train", "rows": 3 + i} for i, text in enumerate(HOSTILE)]
    clusters = [
        {"rows": 30, "distinct": 2, "answers": 1, "input": text, "lines": [f"{text} line 3"]} for text in HOSTILE
    ]
    rows = [{"source": HOSTILE[0], "tokens": [[HOSTILE[1], 0], [HOSTILE[3], 1]], "of": 900}]
    shapes = {"input_lengths": lengths, "answer_lengths": lengths, "labels": labels, "clusters": clusters, "rows": rows}
    counts = {"train": 1200, "held_out": 60, "distinct_inputs": 1000, "near_duplicate_clusters": 900}
    return {"blocked": False, "counts": counts, "findings": [], "shapes": shapes}


def test_the_data_is_shown_and_nothing_of_it_becomes_markup(run):
    write_json(run.data_report, hostile_data_report())
    page = render_page(run, make_report())
    parsed = Tags(page)
    assert parsed.open == []
    assert (parsed.tags.count("script"), parsed.tags.count("style")) == (1, 1)
    assert "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "url(" not in page
    for words in ("1,200 rows trained on", "Length of the inputs", "Labels", "and 29 more", "and 898 more tokens"):
        assert words in page
    assert page.count('class="vega"') == 3
    assert '<mark class="trained">&lt;/style&gt;' in page
    assert page == render_page(run, make_report())


def test_of_many_labels_the_most_frequent_are_drawn():
    labels = [{"label": f"label {i}", "side": "train", "rows": 100 - i} for i in range(150)]
    section = data_section({"shapes": {"labels": labels}})
    assert section["labels_left_out"] == 130
    assert "label 19" in section["pictures"]["Labels"]
    assert "label 20" not in section["pictures"]["Labels"]
