"""One training run: from prepared rows to an adapter (or a model) in the run's folder, interruptible and resumable."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from torch import nn

from tunesmith.chat.display import coloured
from tunesmith.data.batches import Layout, StepPlan, count_steps, make_step
from tunesmith.errors import InputError, InterruptedRun, RefusedError
from tunesmith.lineage import lineage_of, refuse_changed
from tunesmith.models.lora import LoraModel, Routing, add_new_adapter, wrap
from tunesmith.models.peft_format import load_adapter, save_adapter
from tunesmith.planning import Plan, record_actual
from tunesmith.preparation import Prepared
from tunesmith.progress import Reporter
from tunesmith.recipe import Train
from tunesmith.store.runs import Run, read_metrics, write_json, write_text
from tunesmith.train.annotate import load_columns, save_columns, with_columns
from tunesmith.train.bodies import make_body
from tunesmith.train.checkpoint import load_checkpoint, load_newest, save_checkpoint
from tunesmith.train.estimate import choose_layout, estimate, memory_limit
from tunesmith.train.forward import Body
from tunesmith.train.loop import EvalMetrics, Hooks, Progress, StepMetrics, TrainState, evaluate, train
from tunesmith.train.methods import Method, method_of
from tunesmith.train.rate import choose_lr
from tunesmith.train.row_losses import row_losses
from tunesmith.tree.body import prepare as prepare_attention
from tunesmith.types import Example, TokenizedExample

TUNED = "tuned"  # the adapter's name in memory
EVAL_ROWS = 48  # held-out rows scored during training
LOSS_TOKENS = 2_000  # of training rows, scored before training: a few seconds
AUTO_EVALS, AUTO_SAVES = 4, 4  # a run's number of them where the recipe says auto


@dataclass(frozen=True, slots=True)
class Trainable:
    """What is trained, how it is computed, and how it is written to a run's folder.

    `lora` is the model; `adapter` the one of its adapters that is trained, None where every weight is. `save` writes
    the result into a folder.
    """

    lora: LoraModel
    adapter: str | None
    body: Body
    parameters: Mapping[str, nn.Parameter]
    layout: Layout
    memory_limit: int  # bytes
    save: Callable[[Path], None]


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
    lineage = lineage_of(ready)
    if resume and run.lineage.exists():
        refuse_changed(run, lineage)
    write_text(run.recipe, ready.recipe.to_yaml())
    write_json(run.lineage, lineage)
    write_json(run.plan, plan.to_json())
    show_first(ready, reporter)
    method, steps, sample = _annotated(ready, trainable, run, reporter)
    settings = ready.recipe.train
    state = load_newest(run.checkpoints) if resume else None
    _keep_metrics(run, state.progress.step if state else 0)
    lr = learning_rate(ready, reporter)
    reporter.stage(f"training, {len(steps)} steps of {settings.batch_examples} examples")
    if state is not None:
        reporter.say(f"resumed after step {state.progress.step}")
    held_out = make_step(0, 0.0, sample, trainable.layout) if sample else None
    with _Watch(run, len(steps), reporter) as watch:
        if held_out is not None and not method.has_answers and not read_metrics(run):
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
            hooks=replace(watch.hooks(), score=score),
            resume=state,
            name_row=ready.name_row,
        )
    if not result.finished:
        raise InterruptedRun(
            f"stopped after step {result.progress.step} of {len(steps)}, saved; continue with:\n"
            f"  tunesmith train {run.recipe} --run {run.folder} --resume"
        )
    _keep_best(settings, run, result.progress, trainable, reporter)
    record_actual(run, plan)
    _publish(run, trainable, accept)


def plan_run(ready: Prepared, trainable: Trainable) -> Plan:
    """What training will take, measured on this machine for a few seconds."""
    method = method_of(ready.recipe.objective)
    steps = step_plan(ready, trainable.layout, ready.train.examples)
    limit = trainable.memory_limit
    return Plan(estimate(trainable.body, trainable.parameters, steps, method.loss, method.annotate, limit=limit))


def step_plan(ready: Prepared, layout: Layout, examples: Sequence[TokenizedExample]) -> StepPlan:
    """Every step of the run, by the recipe."""
    settings, rows = ready.recipe.train, len(examples) // layout.together
    count = count_steps(rows, settings.batch_examples, settings.epochs, settings.max_steps)
    return StepPlan(examples, settings.batch_examples, count, settings.seed, settings.shuffle, layout)


def base_losses(ready: Prepared, trainable: Trainable) -> tuple[list[Example], list[float]]:
    """A sample of the training rows, evenly chosen, and what the answer of each costs before anything is learned.

    None of rows that are several sequences, or whose answers a teacher gave: what they cost says little of either.
    """
    if ready.train.together > 1 or ready.lessons_hash is not None:
        return [], []
    rows = {example.id: example for example in ready.split.train}
    examples = [each for each in ready.train.examples if each.example_id in rows]  # without what is replayed
    count = min(len(examples), max(1, LOSS_TOKENS * len(examples) // ready.train.tokens))
    sample = [examples[i * len(examples) // count] for i in range(count)]
    losses = row_losses(trainable.body, sample, trainable.layout)
    return [rows[example.example_id] for example in sample], losses.tolist()


def show_first(ready: Prepared, reporter: Reporter) -> None:
    """The first example coloured by what is trained: the quickest check that the right tokens are."""
    first = ready.train.examples[: ready.train.together]
    reporter.say(f"the first example as the model sees it ({ready.name_row(first[0].example_id)}); trained in green:")
    for sequence in first:
        reporter.show(coloured(ready.renderer.pieces(sequence.input_ids.tolist()), sequence.weights.tolist()))


def make_trainable(ready: Prepared, reporter: Reporter) -> Trainable:
    """A new adapter, one to continue from, or every weight of the base; laid out under the memory limit.

    Raises InputError for a model that can't be run, RefusedError where not even one row at a time fits.
    """
    model, section, settings = ready.base.model, ready.recipe.adapter, ready.recipe.train
    torch.manual_seed(settings.seed)
    parameters: dict[str, nn.Parameter]
    if section is None:
        lora, adapter = LoraModel(model, Routing()), None
        abilities, dropout = prepare_attention(model), 0.0
        model.requires_grad_(True)
        parameters, body = dict(model.named_parameters()), make_body(model)
        save = partial(_save_model, ready)
    else:
        lora, adapter = wrap(model), TUNED
        if section.init_from is None:
            add_new_adapter(lora, TUNED, section, settings.seed)
        else:
            load_adapter(lora, TUNED, Path(section.init_from))
        lora.use(TUNED)
        abilities, dropout = prepare_attention(model), section.dropout
        parameters, body = dict(lora.parameters(TUNED)), make_body(model, lora, TUNED)
        save = partial(_save_adapter, ready, lora)
        model.train(dropout > 0)
    if not abilities.share:
        reporter.say(str(abilities.reason))
    elif dropout:
        reporter.say("adapter.dropout makes shared prefixes inexact, so every row is computed in full")
    limit = memory_limit(ready.recipe.runtime.memory_limit)
    share, together = abilities.share and not dropout, ready.train.together
    if together > 1 and not abilities.share:
        raise InputError(f"{abilities.reason}, and objective {ready.recipe.objective.kind} needs two at a time")
    layout = choose_layout(
        body, parameters, ready.train.examples, limit, share=share, pack=abilities.share, together=together
    )
    if layout is None:
        raise RefusedError(
            f"training does not fit in {limit / 1e9:.1f} GB: one row of the data alone takes more; "
            "raise runtime.memory_limit, or lower data.max_seq_len",
            gate="plan",
        )
    return Trainable(lora, adapter, body, parameters, layout, limit, save)


def _publish(run: Run, trainable: Trainable, accept: Callable[[Path], None]) -> None:
    """Write the result beside, have it judged, then give it its name; what is refused is kept under another."""
    target = run.model if trainable.adapter is None else run.adapter
    beside, refused = run.folder / f".{target.name}.partial", run.folder / f"{target.name}.refused"
    for leftover in (beside, refused):
        shutil.rmtree(leftover, ignore_errors=True)
    trainable.save(beside)
    try:
        accept(beside)
    except RefusedError as error:
        beside.rename(refused)
        raise RefusedError(f"{error}; it is kept for a look in {refused}", gate=error.gate) from None
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)


def _save_adapter(ready: Prepared, lora: LoraModel, folder: Path) -> None:
    section, base = ready.recipe.adapter, ready.base
    assert section is not None
    save_adapter(lora, TUNED, folder, section, base.name, base.revision)


def _save_model(ready: Prepared, folder: Path) -> None:
    """Every weight, in Hugging Face layout."""
    ready.base.model.save_pretrained(folder)
    ready.base.tokenizer.save_pretrained(folder)


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
    every = [*(steps.examples[i] for i in used), *sample]
    columns = load_columns(run.columns, len(every))
    if columns is None:
        reporter.stage("what the loss compares with, by the weights as they are before training")
        columns = method.annotate(trainable.body, every, trainable.layout, reporter.advance)
        save_columns(run.columns, columns)
    done, rows = with_columns(every, columns), list(steps.examples)
    for i, row in zip(used, done, strict=False):
        rows[i] = row
    return method, replace(steps, examples=rows), done[len(used) :]


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
    best = load_checkpoint(run.checkpoints / f"step-{progress.best_step}")
    assert best is not None, "the best checkpoint is kept until the run ends"
    with torch.no_grad():
        for name, parameter in trainable.parameters.items():
            parameter.copy_(best.parameters[name])
    reporter.say(f"kept the weights of step {progress.best_step}, the best on the held-out rows")


class _Watch:
    """Writes metrics and checkpoints as they come, and turns a signal into a request to stop after the step."""

    def __init__(self, run: Run, steps: int, reporter: Reporter) -> None:
        self._run, self._steps, self._reporter = run, steps, reporter
        self._asked_to_stop = False
        self._held_out = ""
        self._before: dict[int, object] = {}

    def hooks(self) -> Hooks:
        return Hooks(self._step, self._eval, self._checkpoint, lambda: self._asked_to_stop)

    def __enter__(self) -> _Watch:
        self._file = self._run.metrics.open("a", encoding="utf-8")
        if (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):  # the main thread of a command, not a library's
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        self._reporter.say("finishing this step, then saving; a second signal stops at once")

    def _step(self, metrics: StepMetrics) -> None:
        row = dataclasses.asdict(metrics)
        measures = row.pop("measures")
        self._write({**row, **measures})
        rate = metrics.tokens / metrics.seconds
        text = f"loss {metrics.loss:.3f}  {rate:.0f} tokens/s{self._held_out}"
        if metrics.skipped:
            self._reporter.say(f"step {metrics.step} had a loss or gradient that is not a finite number; skipped")
        self._reporter.advance(metrics.step, self._steps, text)

    def _eval(self, metrics: EvalMetrics) -> None:
        row = dataclasses.asdict(metrics)
        measures = {f"held_out_{name}": value for name, value in row.pop("measures").items()}
        self._write({**row, **measures})
        self._held_out = f"  held-out loss {metrics.held_out_loss:.3f}"
        if metrics.score is not None:
            self._held_out += f", score {metrics.score:.2f}"

    def _checkpoint(self, state: TrainState) -> None:
        save_checkpoint(self._run.checkpoints, state)

    def _write(self, row: dict[str, object]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
