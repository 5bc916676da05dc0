"""The data gate: no compute is spent on data that can't teach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.formats import read_examples, read_held_out, silent
from tunesmith.data.lazy import picked
from tunesmith.data.look import token_rows
from tunesmith.data.material import Material, Note
from tunesmith.data.private import quote
from tunesmith.data.report import DataReport, make_report
from tunesmith.data.rules import contradiction, coverage, form, leakage, learning, safety, suspicion, targets
from tunesmith.data.split import Split, identify, split
from tunesmith.recipe import Data
from tunesmith.types import Finding

if TYPE_CHECKING:
    from tunesmith.chat.renderer import Renderer

RULES: tuple[Callable[[Material], Iterator[Note]], ...] = (
    form.role_order,
    form.unknown_keys,
    form.empty_input,
    form.tool_mismatch,
    targets.schema_invalid,
    targets.json_drift,
    learning.no_supervised_token,
    learning.rendering,
    learning.over_limit,
    learning.same_answer,
    learning.label_counts,
    leakage.split_leak,
    leakage.group_leak,
    leakage.few_shot_leak,
    leakage.duplicates,
    leakage.near_duplicates,
    contradiction.contradiction,
    contradiction.near_contradiction,
    suspicion.likely_wrong_label,
    suspicion.length_outlier,
    safety.private_data,
    safety.injected_instructions,
    safety.control_tokens,
    coverage.few_rows,
    coverage.detectable_effect,
    coverage.label_coverage,
    coverage.length_shift,
    coverage.vocabulary_shift,
)
BARS = 24
CLUSTERS_SHOWN = 20


def gate(
    data: Data,
    renderer: Renderer | None = None,
    *,
    limit: int | None = None,
    say: Callable[[str], None] = silent,
    inputs: bool = False,
) -> DataReport:
    """Read a recipe's rows, split and check them; rows that can't be read become findings. Raises InputError.

    `inputs`: rows may leave the answer to a teacher.
    """
    faults: list[Finding] = []
    examples = read_examples(data, faults=faults, say=say, inputs=inputs)
    given = read_held_out(data, faults=faults, say=say, inputs=inputs)
    held_out = data.held_out if given is None else given
    assert not isinstance(held_out, str), "a held-out file has been read"
    return check(split(examples, held_out, data.group_by), data, renderer, limit=limit, faults=faults)


def check(
    rows: Split,
    data: Data,
    renderer: Renderer | None = None,
    *,
    limit: int | None = None,
    faults: Iterable[Finding] = (),
) -> DataReport:
    """Hold the rows against every rule. Raises InputError only where `data.schema` is at fault.

    renderer  of the base to be trained; without it the rules about rendering are left out
    limit     the longest row allowed, in tokens
    faults    what `read_examples(data, faults=…)` met on its way
    """
    material = _material(rows, data, renderer, limit)
    notes = [note for rule in RULES for note in rule(material)] if material.rows else []
    return make_report(rows, data, faults, notes, _counts(material), _shapes(material))


def _material(
    rows: Split,
    data: Data,
    renderer: Renderer | None,
    limit: int | None,
) -> Material:
    """Each source once: copies that a file's weight made are no duplicates."""
    first = identify(rows.train)[2]
    numbers = np.concatenate([first, np.arange(len(rows.held_out)) + len(rows.train)]).astype(np.int64)
    return Material(
        picked(rows.train, first),
        rows.held_out,
        rows.same[numbers],
        rows.near[numbers],
        data,
        renderer,
        limit,
    )


def _counts(material: Material) -> dict[str, Any]:
    labels = Counter(material.labels or ())
    return {
        "train": len(material.train),
        "held_out": len(material.held_out),
        "kinds": dict(Counter(row.kind for row in material.rows)),
        "distinct_inputs": len(set(material.same.tolist())),
        "near_duplicate_clusters": len(set(material.near.tolist())),
        "labels": {quote(label)[1:-1]: count for label, count in labels.most_common()},
    }


def _shapes(material: Material) -> dict[str, Any]:
    """Numbers for the pictures, private data masked."""
    return {
        "input_lengths": _histogram([len(text) for text in material.inputs], len(material.train)),
        "answer_lengths": _histogram([len(text) for text in material.answers], len(material.train)),
        "labels": _label_bars(material),
        "clusters": _largest_clusters(material),
        "rows": _tokens(material),
    }


def _tokens(material: Material) -> list[dict[str, Any]]:
    """Rows as the model will see them, where there is a renderer to say."""
    if material.renderer is None or any(row.kind == "preference" for row in material.train[:1]):
        return []
    return token_rows(material.train, material.renderer, material.data.train_on)


def _histogram(sizes: list[int], train: int) -> list[dict[str, Any]]:
    """Rows by length in characters, for both sides, in BARS steps up to the 99th percentile and one beyond."""
    if not sizes:
        return []
    top = max(float(np.percentile(sizes, 99)), BARS)
    edges = np.append(np.linspace(0, top, BARS + 1).round(), np.inf)
    edges[-1] = max(*sizes, edges[-2]) + 1
    sides = (("train", sizes[:train]), ("held out", sizes[train:]))
    return [
        {"side": side, "from": int(edges[i]), "to": int(edges[i + 1]), "rows": int(count)}
        for side, values in sides
        for i, count in enumerate(np.histogram(values, edges)[0])
    ]


def _label_bars(material: Material) -> list[dict[str, Any]]:
    if material.labels is None:
        return []
    sides = ["train"] * len(material.train) + ["held out"] * len(material.held_out)
    counts = Counter(zip(material.labels, sides, strict=True))
    return [{"label": quote(label, 40)[1:-1], "side": side, "rows": n} for (label, side), n in sorted(counts.items())]


def _largest_clusters(material: Material) -> list[dict[str, Any]]:
    """The largest clusters of equal or nearly equal inputs, with the lines to open."""
    sizes = Counter(material.near.tolist())
    shown = [number for number, size in sizes.most_common(CLUSTERS_SHOWN) if size > 1]
    clusters = []
    for number in shown:
        members = np.flatnonzero(material.near == number).tolist()
        clusters.append(
            {
                "rows": len(members),
                "distinct": len({int(material.same[n]) for n in members}),
                "answers": len({material.answers[n] for n in members}),
                "input": quote(material.inputs[members[0]], 120)[1:-1],
                "lines": [str(source) for source in material.sources(members[:CLUSTERS_SHOWN])],
            }
        )
    return clusters
