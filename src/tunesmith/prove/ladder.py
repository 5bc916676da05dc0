"""Running the contenders over the held-out items, row by row into items.jsonl."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.chat.parse import spoken
from tunesmith.progress import Reporter
from tunesmith.prove.answering import Progress, Reply, ReplyCache
from tunesmith.prove.contender import Contender
from tunesmith.prove.rows import Row
from tunesmith.prove.scorers import LabelReader, Scorer
from tunesmith.prove.scoring import score_answer
from tunesmith.prove.statistics import standard_error
from tunesmith.prove.task import question
from tunesmith.types import Item

AT_ONCE = 96  # items in one call of the engine; rows are written after each
FIRST_LOOK = 24  # then after 36, 54, 81, ...: half as many again
DECIDED_BY = 0.05  # no rule of the verdict asks for more
SHOWN_INPUT = 4000  # characters of a question kept in items.jsonl, for the page
DECIDED_CONFIDENCE = 0.999  # two-sided, so that looking several times keeps the error of stopping under 1%


@dataclass(frozen=True, slots=True)
class Plan:
    """The held-out items and how they are scored."""

    items: Sequence[Item]
    scorers: Sequence[Scorer]  # the main one first
    reader: LabelReader | None  # for label tasks
    groups: Mapping[str, str]
    slices: Mapping[str, Mapping[str, str]]


def run_ladder(
    contenders: Sequence[Contender],
    reference: str | None,
    plan: Plan,
    cache: ReplyCache,
    *,
    out: Path | None = None,
    stop_early: bool = True,
    reporter: Reporter | None = None,
) -> list[Row]:
    """Every contender's rows, contenders in the given order, items in the order of the file.

    `reference` (the tuned model) answers first and always in full. Another contender stops after 24, 36, 54, ...
    items where its difference from the reference on the main scorer, on the same items, is below -5 points by its
    99.9% interval (Student's t): it has lost, and more items would only say by how much. Items are taken in an order
    shuffled by their ids, the same for all, so that what was answered is a fair sample.
    """
    reporter = reporter or Reporter()
    answered: dict[str, list[Row]] = {}
    shuffled = sorted(plan.items, key=lambda item: hashlib.sha256(item.id.encode()).digest())
    order = sorted(contenders, key=lambda each: each.name != reference)
    if out is not None:
        out.write_text("", encoding="utf-8")
    for contender in order:
        rivals = answered.get(reference or "") if stop_early and contender.kind != "classifier" else None
        answered[contender.name] = _run(contender, shuffled, plan, cache, rivals, out, reporter)
    place = {item.id: number for number, item in enumerate(plan.items)}
    return [
        row for contender in contenders for row in sorted(answered[contender.name], key=lambda row: place[row.item])
    ]


def lost(rows: Sequence[Row], reference: Sequence[Row], scorer: str) -> bool:
    """Whether the rows' contender is decidedly behind the reference on the items both answered."""
    against = {row.item: row for row in reference}
    pairs = [(row, against[row.item]) for row in rows if row.item in against]
    differences: list[float] = []
    groups: list[str] = []
    for row, other in pairs:
        mine, theirs = row.scores[scorer], other.scores[scorer]
        if mine is not None and theirs is not None:
            differences.append(mine - theirs)
            groups.append(row.group)
    clusters = len(set(groups))
    if clusters < FIRST_LOOK // 2:
        return False
    from scipy import stats

    mean, quantile = sum(differences) / len(differences), stats.t.ppf((1 + DECIDED_CONFIDENCE) / 2, clusters - 1)
    return bool(mean + quantile * standard_error(differences, groups) < -DECIDED_BY)


def _run(
    contender: Contender,
    items: Sequence[Item],
    plan: Plan,
    cache: ReplyCache,
    reference: Sequence[Row] | None,
    out: Path | None,
    reporter: Reporter,
) -> list[Row]:
    rows: list[Row] = []
    look, main, detail = FIRST_LOOK, plan.scorers[0].name, contender.name
    while len(rows) < len(items):
        end = len(rows) + AT_ONCE if reference is None else min(look, len(rows) + AT_ONCE)
        batch = items[len(rows) : end]
        replies = contender.answer(batch, cache, _part_of(reporter, len(rows), len(items), detail))
        fresh = [_row(contender, item, reply, plan) for item, reply in zip(batch, replies, strict=True)]
        rows += fresh
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.writelines(row.to_line() for row in fresh)
        scores = [row.scores[main] or 0.0 for row in rows]
        detail = f"{contender.name}: {main} {sum(scores) / len(scores):.2f}"
        reporter.advance(len(rows), len(items), detail)
        if reference is not None and len(rows) == look < len(items):
            look += look // 2
            if lost(rows, reference, main):
                reporter.say(f"{contender.name} has lost after {len(rows)} of {len(items)} items; it stops here")
                break
    return rows


def _part_of(reporter: Reporter, before: int, total: int, detail: str) -> Progress:
    """A batch's progress as part of the whole; its end is told once its rows are scored."""

    def tell(done: int, of: int) -> None:
        if done < of:
            reporter.advance(before + done, total, detail)

    return tell


def _row(contender: Contender, item: Item, reply: Reply, plan: Plan) -> Row:
    scored = score_answer(plan.scorers, reply.output, item, failed=reply.error)
    return Row(
        item=item.id,
        contender=contender.name,
        kind=contender.kind,
        prompt_tokens=reply.prompt_tokens,
        output=reply.output,
        finish_reason=reply.finish_reason,
        scores=scored.scores,
        output_tokens=reply.output_tokens,
        seconds=reply.seconds,
        input=question(item)[:SHOWN_INPUT],
        expected=item.expected,
        group=plan.groups[item.id],
        source=str(item.source),
        label=plan.reader.read(spoken(reply.output)) if plan.reader is not None else None,
        slices=dict(plan.slices[item.id]),
        faults={"answer": reply.error, **scored.faults} if reply.error else scored.faults,
    )
