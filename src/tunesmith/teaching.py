"""Rows answered by a teacher before training: what `objective.kind` compress and distill learn from.

    rows ─► those the run will see ─► the teacher's answers ─► lessons ─► token ids ─► the teacher's likeliest tokens

Answers are remembered in the run's replies.jsonl (the proof asks some of the same), the distributions in
distributions.safetensors: killed and started again, it goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from tunesmith.chat.renderer import Renderer
from tunesmith.data.batches import epoch_order
from tunesmith.data.items import items
from tunesmith.data.lazy import evenly
from tunesmith.data.parts import answer_text, asked_turns
from tunesmith.data.prompts import with_prompt
from tunesmith.data.schema import load_schema
from tunesmith.data.split import Split
from tunesmith.data.tokenize import Tokenized, tokenize
from tunesmith.errors import InputError
from tunesmith.models.loading import LoadedBase
from tunesmith.progress import Reporter
from tunesmith.prove.answering import Prompt, Reply, ReplyCache
from tunesmith.prove.endpoint import Endpoint
from tunesmith.prove.proving import answer_budget
from tunesmith.prove.scorers import Scorer
from tunesmith.prove.scoring import choose_scorers, score_answer
from tunesmith.prove.task import detect_task
from tunesmith.recipe import Distill, Recipe
from tunesmith.store.runs import Run, write_text
from tunesmith.teachers import Teacher, teacher_of
from tunesmith.train.annotate import Columns, load_columns, save_columns, with_columns
from tunesmith.train.losses import TEACHER_IDS, TEACHER_LOGPROBS
from tunesmith.types import Example, Item, Message, TokenizedExample

AT_ONCE = 64  # rows asked together; remembered after each
HELD_OUT = 48  # held-out rows with an answer of their own that are also taught: the held-out loss is measured on them
TRIED = 8  # rows asked where there is no run yet, for a plan


@dataclass(frozen=True)
class Taught:
    """The rows with the teacher's answers, and the same as token ids with its distributions. `hash` is of both."""

    split: Split  # the training rows as taught; the held-out rows that have an answer, their own before the teacher's
    train: Tokenized
    held_out: Tokenized | None
    hash: str


def teach(
    recipe: Recipe, rows: Split, base: LoadedBase, renderer: Renderer, limit: int, run: Run | None, reporter: Reporter
) -> Taught:
    """Have the rows answered. Without a run only TRIED of them, which then stand for all: enough for a plan.

    Raises InputError where the teacher is no use, or stopped answering: what it said is kept in the run's folder.
    """
    began = time.monotonic()
    max_tokens = answer_budget(recipe, rows.train or rows.held_out, renderer)
    teacher = teacher_of(recipe, base, renderer, max_tokens)
    train = _seen(rows.train, recipe)
    held_out = [*evenly([row for row in rows.held_out if row.kind != "input"], HELD_OUT)]
    held_out += [row for row in rows.held_out if row.kind == "input"]
    reporter.stage(f"answers by {teacher.name}")
    asked = {row.id: row for row in (*train, *held_out) if teacher.every_row or row.kind == "input"}
    replies = _ask(teacher, list(asked.values()), run, reporter)
    left_out: Counter[str] = Counter()
    judge = _judge(recipe, [*rows.train, *rows.held_out])
    lessons = {row.id: lesson for row in asked.values() if (lesson := judge(row, replies[row.id], left_out))}
    lessons |= {row.id: row for row in (*train, *held_out) if row.id not in asked}
    _say_left_out(teacher, lessons, left_out, max_tokens, reporter)
    how = recipe.data.model_copy(update={"train_on": "last"})
    sides = [[lessons[row.id] for row in side if row.id in lessons] for side in (train, held_out)]
    if not sides[0]:
        raise InputError(f"the teacher gave no answer to learn from: {_counted(left_out)}")
    tokenized = [tokenize(side, renderer, how, limit) if side else None for side in sides]
    tokenized = _with_distributions(teacher, tokenized, lessons, recipe, renderer, run, reporter)
    assert tokenized[0] is not None
    if run is not None:
        _write(run, teacher, list(asked.values()), lessons, replies, left_out, time.monotonic() - began)
    expected = [row if row.kind != "input" else lessons.get(row.id, row) for row in rows.held_out]
    split = _rearranged(rows, sides[0], [row for row in expected if row.kind != "input"])
    return Taught(split, tokenized[0], tokenized[1], _digest(lessons.values()))


def with_lessons(held_out: Sequence[Example], run: Run) -> list[Example]:
    """Held-out rows as a proof meets them: what leaves the answer out is held against the teacher's."""
    said = {each["id"]: each["answer"] for each in _read(run)[1:] if each["answer"] is not None}
    return [_answered(row, said[row.id]) if row.kind == "input" and row.id in said else row for row in held_out]


def teaching_seconds(run: Run) -> float:
    """What the teacher's answers and distributions took."""
    lines = _read(run)
    return lines[0]["seconds"] if lines else 0.0


def _seen(rows: Sequence[Example], recipe: Recipe) -> list[Example]:
    """The rows that the run will see: where `max_steps` ends it before an epoch does, the others are not asked."""
    settings = recipe.train
    count = len(rows) if settings.max_steps is None else settings.max_steps * settings.batch_examples
    order = epoch_order(len(rows), 0, settings.seed, settings.shuffle)
    return [rows[i] for i in np.sort(order[:count])]


def _ask(teacher: Teacher, rows: Sequence[Example], run: Run | None, reporter: Reporter) -> dict[str, Reply]:
    """The teacher's reply to each row, by the row's id."""
    if run is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
    tried = rows if run is not None else evenly(rows, TRIED)
    cache, began = ReplyCache(None if run is None else run.replies), time.monotonic()
    replies: list[Reply] = []
    for start in range(0, len(tried), AT_ONCE):
        batch = tried[start : start + AT_ONCE]
        prompts = [Prompt(with_prompt(teacher.prompt, asked_turns(row)), row.tools) for row in batch]
        replies += cache.answer(
            teacher.model, prompts, lambda done, of, before=start: reporter.advance(before + done, len(tried))
        )
        if isinstance(teacher.model, Endpoint) and teacher.model.dead:
            answered = sum(reply.error is None for reply in replies)
            first = next(reply.error for reply in replies if reply.error)
            raise InputError(
                f"the teacher {teacher.name} stopped answering ({first}); {answered} of {len(rows)} answers are kept"
                f"{'' if run is None else f' in {run.replies}'}; start again when it answers, and only the others "
                "are asked for"
            )
    if run is None and rows:
        seconds = (time.monotonic() - began) / len(tried) * len(rows)
        reporter.say(
            f"the teacher answers {len(rows):,} rows first: at most {seconds / 60:.0f} min, by {len(tried)} tried"
        )
    return {row.id: replies[i % len(replies)] for i, row in enumerate(rows)}


def _judge(recipe: Recipe, rows: Sequence[Example]) -> Callable[[Example, Reply, Counter[str]], Example | None]:
    """What makes a lesson of a reply, or counts why it is none."""
    objective, known = recipe.objective, {item.id: item for item in items(rows) if (item.expected or "").strip()}
    wanted = isinstance(objective, Distill)
    schema = load_schema(recipe.data.schema_file) if wanted and recipe.data.schema_file is not None else None
    least = objective.keep_above if isinstance(objective, Distill) else None
    scorers = choose_scorers(recipe.prove.scorers, detect_task([*known.values()]))[:1] if least is not None else []

    def judge(row: Example, reply: Reply, left_out: Counter[str]) -> Example | None:
        if reply.error is not None:
            left_out[reply.error] += 1
        elif not reply.output.strip():
            left_out["empty"] += 1
        elif reply.finish_reason == "length":
            left_out["cut off"] += 1
        elif schema is not None and not _allowed(schema.fault, reply.output):
            left_out["not what data.schema allows"] += 1
        elif least is not None and row.id in known and _points(scorers, reply.output, known[row.id]) < least:
            left_out["below objective.keep_above"] += 1
        else:
            return _answered(row, reply.output)
        return None

    return judge


def _allowed(fault: Callable[[object], str | None], answer: str) -> bool:
    try:
        return fault(json.loads(answer)) is None
    except (ValueError, RecursionError):
        return False


def _points(scorers: Sequence[Scorer], answer: str, item: Item) -> float:
    score = score_answer(scorers, answer, item).scores[scorers[0].name]
    return 100.0 if score is None else 100 * score


def _answered(row: Example, answer: str) -> Example:
    turn = cast(Message, {"role": "assistant", "content": answer})
    return replace(row, kind="chat", messages=(*asked_turns(row), turn))


def _say_left_out(
    teacher: Teacher, lessons: Mapping[str, Example], left_out: Counter[str], max_tokens: int, reporter: Reporter
) -> None:
    if left_out:
        longer = f" (an answer may have {max_tokens} tokens: prove.max_new_tokens)" if left_out["cut off"] else ""
        reporter.say(
            f"{left_out.total():,} of {left_out.total() + len(lessons):,} rows are not learned from, because of "
            f"{teacher.name}'s answer: {_counted(left_out)}{longer}"
        )


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in left_out.most_common())


def _with_distributions(
    teacher: Teacher,
    sides: list[Tokenized | None],
    lessons: Mapping[str, Example],
    recipe: Recipe,
    renderer: Renderer,
    run: Run | None,
    reporter: Reporter,
) -> list[Tokenized | None]:
    """Both sides with the teacher's columns, where it is one that has any."""
    sequences = [each for side in sides if side is not None for each in side.examples]
    if teacher.likeliest is None:
        return sides
    seen = [_as_seen(each, lessons[each.example_id], teacher, renderer) for each in sequences]
    digest = hashlib.sha256(b"".join(each.input_ids.tobytes() for each in seen)).hexdigest()
    k = recipe.objective.top_k  # type: ignore[union-attr]  (an objective whose teacher has distributions)
    of = f"{teacher.name}, {k} of each: {digest}"
    columns = _blank(seen, k) if run is None else load_columns(run.distributions, len(seen), of)
    if columns is None:
        assert run is not None
        reporter.stage("how likely the teacher finds each token of the answers")
        columns = teacher.likeliest(seen, reporter.advance)
        save_columns(run.distributions, columns, of)
    done = iter(with_columns(sequences, columns))
    return [side and replace(side, examples=[next(done) for _ in side.examples]) for side in sides]


def _as_seen(each: TokenizedExample, lesson: Example, teacher: Teacher, renderer: Renderer) -> TokenizedExample:
    """What the student is given, as the teacher sees it: behind the prompt; without one they see the same."""
    if not teacher.prompt:
        return each
    asked = renderer.prompt_ids(with_prompt(teacher.prompt, asked_turns(lesson)), list(lesson.tools))
    said = np.flatnonzero(each.weights)
    ids = np.concatenate((np.asarray(asked, np.int32), each.input_ids[said]))
    weights = np.concatenate((np.zeros(len(asked), np.float32), each.weights[said]))
    return TokenizedExample(each.example_id, ids, weights)


def _blank(sequences: Sequence[TokenizedExample], k: int) -> Columns:
    """Columns of the right shapes, for a plan: nothing is learned from them."""
    shapes = [(int(np.count_nonzero(each.weights)), k) for each in sequences]
    return {
        TEACHER_IDS: [np.zeros(shape, np.int32) for shape in shapes],
        TEACHER_LOGPROBS: [np.full(shape, -math.log(2 * k), np.float32) for shape in shapes],
    }


def _rearranged(rows: Split, train: list[Example], held_out: list[Example]) -> Split:
    """The split with other rows on its sides; its clusters go with the rows."""
    places = {row.id: i for i, row in enumerate([*rows.train, *rows.held_out])}
    numbers = np.array([places[row.id] for row in (*train, *held_out)], np.int64)
    return replace(rows, train=train, held_out=held_out, near=rows.near[numbers], same=rows.same[numbers])


def _digest(lessons: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for each in lessons:
        digest.update(f"{each.id} {answer_text(each)}\n".encode())
    return digest.hexdigest()


def _write(
    run: Run,
    teacher: Teacher,
    asked: Sequence[Example],
    lessons: Mapping[str, Example],
    replies: Mapping[str, Reply],
    left_out: Counter[str],
    seconds: float,
) -> None:
    """lessons.jsonl: the facts, then each row asked and what it learns from (null where nothing)."""
    waited = sum(reply.seconds for reply in replies.values())
    before = teaching_seconds(run)  # answers that were remembered took their time once
    facts = {"teacher": teacher.name, "rows": len(lessons), "left_out": dict(left_out)}
    facts["seconds"] = max(before, waited, seconds)
    lines = [facts]
    for row in asked:
        answer = answer_text(lessons[row.id]) if row.id in lessons else None
        lines.append({"id": row.id, "source": str(row.source), "answer": answer})
    write_text(run.lessons, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _read(run: Run) -> list[dict[str, Any]]:
    if not run.lessons.exists():
        return []
    return [json.loads(line) for line in run.lessons.read_text(encoding="utf-8").splitlines()]
