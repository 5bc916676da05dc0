"""One training run: from prepared rows to an adapter (or a model) in the run's folder, interruptible and resumable."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tunesmith.chat.display import coloured
from tunesmith.data.batches import StepPlan, make_step
from tunesmith.data.lazy import Lazy, evenly, joined, picked
from tunesmith.disk import flush, flush_all
from tunesmith.errors import InterruptedRun, RefusedError
from tunesmith.lineage import lineage_of, resumed
from tunesmith.planning import Plan, record_actual
from tunesmith.preparation import Prepared
from tunesmith.progress import Reporter
from tunesmith.recipe import Train
from tunesmith.stopping import resume_command
from tunesmith.store.runs import Run, read_metrics, write_json, write_text
from tunesmith.train import parallel
from tunesmith.train.annotate import load_columns, save_columns, with_columns
from tunesmith.train.checkpoint import load_checkpoint, load_newest
from tunesmith.train.estimate import estimate
from tunesmith.train.loop import Progress, TrainState, evaluate, train
from tunesmith.train.methods import Method, method_of
from tunesmith.train.rate import choose_lr
from tunesmith.train.row_losses import row_losses
from tunesmith.trainable import Trainable, step_plan
from tunesmith.types import Example, TokenizedExample
from tunesmith.watch import Watch

EVAL_ROWS = 48  # held-out rows scored during training
LOSS_TOKENS = 2_000  # of training rows, scored before training: a few seconds
AUTO_EVALS, AUTO_SAVES = 4, 4  # a run's number of them where the recipe says auto


def fit(
    ready: Prepared,
    trainable: Trainable,
    plan: Plan,
    run: Run,
    *,
    resume: bool,
    reporter: Reporter,
    accept: Callable[[Path], None],
    score: Callable[[], float] | None = None,
) -> None:
    """Train and leave `adapter/` (or `model/`). Raises InterruptedRun, after saving, when a signal asked to stop.

    `accept` judges what was written before it gets its name, and raises RefusedError where it must not be used.
    `score` measures the weights in memory at every evaluation; the best evaluation is then the one it says.
    """
    state = load_newest(run.checkpoints, trainable.parameters, reporter.say) if resume else None
    if parallel.is_first():
        _note_start(ready, trainable, plan, run, state, reporter, resume=resume)
    show_first(ready, reporter)
    began = time.perf_counter()
    method, steps, sample = _annotated(ready, trainable, run, reporter)
    before = time.perf_counter() - began if method.annotate is not None else 0.0
    settings = ready.recipe.train
    if parallel.is_first():
        _keep_metrics(run, state.progress.step if state else 0)
    lr = learning_rate(ready, reporter)
    reporter.stage(f"training, {len(steps)} steps of {settings.batch_examples} examples")
    if state is not None:
        reporter.say(f"resumed after step {state.progress.step}")
    held_out = make_step(0, 0.0, sample, trainable.layout) if sample else None
    torch.manual_seed(settings.seed)  # whatever was measured before, and whether it was at all
    with Watch(run, len(steps), reporter) as watch:
        new = parallel.from_first(lambda: not read_metrics(run))
        if held_out is not None and not method.has_answers and new:
            watch.hooks().on_eval(evaluate(trainable.body, held_out, method.loss, 0))  # where training starts from
        result = train(
            trainable.body,
            trainable.parameters,
            steps,
            method.loss,
            settings,
            lr=lr,
            held_out=held_out,
            eval_every=_every(settings.eval_every, len(steps), AUTO_EVALS),
            save_every=_every(settings.save_every, len(steps), AUTO_SAVES),
            hooks=replace(watch.hooks(), score=score and partial(parallel.from_first, score)),
            resume=state,
            name_row=ready.name_row,
        )
    trainable.body.rest()
    parallel.wait()  # until what the first worker writes is written
    if not result.finished:
        raise InterruptedRun(
            f"stopped after step {result.progress.step} of {len(steps)}, saved; continue with:\n  {resume_command(run)}"
        )
    _keep_best(settings, run, result.progress, trainable, reporter)
    if parallel.is_first():
        record_actual(run, plan, before)
    _publish(run, trainable, accept)


def _note_start(
    ready: Prepared,
    trainable: Trainable,
    plan: Plan,
    run: Run,
    state: TrainState | None,
    reporter: Reporter,
    *,
    resume: bool,
) -> None:
    lineage, unlike = lineage_of(ready, trainable.layout, trainable.memory_limit), None
    if resume and run.lineage.exists():
        lineage, unlike = resumed(run, lineage, state.progress.step if state else 0)
    if unlike is not None:
        reporter.say(unlike)
    write_text(run.recipe, ready.recipe.to_yaml())
    write_json(run.lineage, lineage)
    write_json(run.plan, plan.to_json())


def plan_run(ready: Prepared, trainable: Trainable, beside: int = 0) -> Plan:
    """What training will take, measured on this machine for a few seconds. `beside`: see `estimate`."""
    method = method_of(ready.recipe.objective)
    steps = step_plan(ready, trainable.layout, ready.train.examples)
    limit = trainable.memory_limit
    what = trainable.body, trainable.parameters, steps, method.loss, method.annotate
    noted = [] if method.annotate is None else _eval_sample(ready)
    found = estimate(*what, limit=limit, beside=beside, held_out=noted)
    return Plan(found, price_per_hour=ready.recipe.runtime.price_per_hour)


def base_losses(ready: Prepared, trainable: Trainable) -> tuple[list[Example], list[float]]:
    """A sample of the training rows, evenly chosen, and what the answer of each costs before anything is learned.

    None of rows that are several sequences, or whose answers a teacher gave: what they cost says little of either.
    """
    if ready.train.together > 1 or ready.lessons_hash is not None:
        return [], []
    train = ready.train
    own = np.flatnonzero(train.rows >= 0)  # without what is replayed
    sample = own[[*evenly(range(len(own)), max(1, LOSS_TOKENS * len(own) // train.tokens))]]
    losses = row_losses(trainable.body, [*picked(train.examples, sample)], trainable.layout)
    return [*picked(ready.split.train, train.rows[sample])], losses.tolist()


def show_first(ready: Prepared, reporter: Reporter) -> None:
    """The first example coloured by what is trained: the quickest check that the right tokens are."""
    first = ready.train.examples[: ready.train.together]
    reporter.say(f"the first example as the model sees it ({ready.name_row(first[0].example_id)}); trained in green:")
    for sequence in first:
        reporter.show(coloured(ready.renderer.pieces(sequence.input_ids.tolist()), sequence.weights.tolist()))


def _publish(run: Run, trainable: Trainable, accept: Callable[[Path], None]) -> None:
    """Write the result beside, have it judged, then give it its name; what is refused is kept under another.

    The first worker does; the others take part in what needs all of the weights.
    """
    target = run.model if trainable.adapter is None else run.adapter
    beside, refused = run.folder / f".{target.name}.partial", run.folder / f"{target.name}.refused"
    if parallel.is_first():
        for leftover in (beside, refused):
            shutil.rmtree(leftover, ignore_errors=True)
    trainable.save(beside)
    try:
        accept(beside)
    except RefusedError as error:
        beside.rename(refused)
        raise RefusedError(f"{error}; it is kept for a look in {refused}", gate=error.gate) from None
    if not parallel.is_first():
        return
    flush_all(beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    flush(run.folder)


def learning_rate(ready: Prepared, reporter: Reporter) -> float:
    """The recipe's peak rate; where it says auto, one chosen by the model's width, and why is said."""
    asked = ready.recipe.train.lr
    if asked != "auto":
        return asked
    hidden = ready.base.model.config.get_text_config().hidden_size
    objective = ready.recipe.objective
    times = method_of(objective).lr_times
    lr, why = choose_lr(hidden, lora=ready.recipe.adapter is not None, objective=objective.kind, times=times)
    reporter.say(why)
    return lr


def _every(setting: int | Literal["auto"], steps: int, times: int) -> int:
    return max(1, steps // times) if setting == "auto" else setting


def _eval_sample(ready: Prepared) -> list[TokenizedExample]:
    """A sample of the held-out rows, spread evenly over them; empty where nothing is held out."""
    if ready.held_out is None:
        return []
    sequences, together = ready.held_out.examples, ready.held_out.together
    rows = len(sequences) // together
    count = min(EVAL_ROWS, rows)
    return [sequences[(i * rows // count) * together + k] for i in range(count) for k in range(together)]


def _annotated(
    ready: Prepared, trainable: Trainable, run: Run, reporter: Reporter
) -> tuple[Method, StepPlan, list[TokenizedExample]]:
    """The method, and the steps and the held-out sample with the columns its loss needs.

    They are computed by the weights training starts from, once: a resumed run finds them in its folder.
    """
    method, sample = method_of(ready.recipe.objective), _eval_sample(ready)
    steps = step_plan(ready, trainable.layout, ready.train.examples)
    if method.annotate is None:
        return method, steps, sample
    used = steps.used()
    every = joined(picked(steps.examples, used), sample)
    columns = load_columns(run.columns, len(every))
    if columns is None:
        reporter.stage("what the loss compares with, by the weights as they are before training")
        continued = ready.recipe.adapter is not None and ready.recipe.adapter.init_from is not None
        with trainable.adapter_off() if method.of_base and continued else nullcontext(trainable.body) as body:
            columns = method.annotate(body, every, trainable.layout, reporter.advance)
        if parallel.is_first():
            save_columns(run.columns, columns)
    done, place = with_columns(every, columns), np.full(len(steps.examples), -1)
    place[used] = np.arange(len(used))

    def example(i: int) -> TokenizedExample:
        return done[place[i]] if place[i] >= 0 else steps.examples[i]

    return method, replace(steps, examples=Lazy(len(place), example)), [*done[len(used) :]]


def _keep_metrics(run: Run, step: int) -> None:
    """Drop the rows of steps that will be run again."""
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def _keep_best(settings: Train, run: Run, progress: Progress, trainable: Trainable, reporter: Reporter) -> None:
    """Under `patience` the best evaluated weights are the ones kept; without it a word where they were not the last."""
    if progress.best_step in (None, progress.step):
        return
    if settings.patience is None:
        reporter.say(
            f"the held-out rows were at their best after step {progress.best_step} of {progress.step}: fewer epochs "
            "would do, or train.patience, which keeps the best"
        )
        return
    best = load_checkpoint(run.checkpoints / f"step-{progress.best_step}", trainable.parameters)
    if best is None:
        reporter.say(f"the weights of step {progress.best_step} were the best, but are damaged; the last ones are kept")
        return
    with torch.no_grad():
        for name, parameter in trainable.parameters.items():
            parameter.copy_(best.parameters[name])
    reporter.say(f"kept the weights of step {progress.best_step}, the best on the held-out rows")
