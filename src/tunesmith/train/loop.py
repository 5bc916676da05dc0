"""The training loop: one for every method. The loss returns a sum, which is divided by the step's weight.

For every step: its gradient (train/gradient.py), clip, update, report; now and then evaluate and save. All
that decides what comes next (parameters, optimiser, progress, random numbers) is in `TrainState`, so that a run
resumed from one goes on byte for byte as if it had not stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from tunesmith.data.batches import Step
from tunesmith.errors import TunesmithError
from tunesmith.models.memory import forget_peak, peak_bytes
from tunesmith.recipe import Train
from tunesmith.train import parallel
from tunesmith.train.forward import Body
from tunesmith.train.gradient import accumulate, means
from tunesmith.train.losses import Loss
from tunesmith.train.optim import adamw, grad_norm, load_state_tensors, lr_at, scale_grads, set_lr, state_tensors

BAD_STEPS_IN_A_ROW = 3  # steps without a finite loss and gradient before the run is given up


class Steps(Protocol):
    """The steps of a run in their order; each may be made when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Step: ...


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step, with metrics.jsonl's fields.

    `loss` is the mean over the step's weight: its supervised tokens, or its pairs. So is all that `measures` holds.
    """

    step: int  # 1 for the first
    epoch: float
    loss: float
    lr: float
    grad_norm: float  # before clipping
    examples: int
    tokens: int
    computed_tokens: int
    supervised_tokens: int
    seconds: float
    peak_memory_bytes: int
    measures: Mapping[str, float]  # what the loss says of itself, such as token_accuracy
    skipped: bool = False  # loss or gradient was not finite: nothing was updated


@dataclass(frozen=True)
class EvalMetrics:
    """The held-out rows, scored after `step` updates."""

    step: int
    held_out_loss: float
    measures: Mapping[str, float]  # as in training, on the held-out rows
    score: float | None = None  # the main scorer's mean on a sample of answers, 0 to 1


@dataclass(frozen=True)
class Progress:
    """How far a run is; plain numbers, kept in the checkpoint's manifest."""

    step: int = 0  # updates done; also the position in the data, which is a pure function of it
    best_step: int | None = None
    best_loss: float | None = None
    best_score: float | None = None
    evals_without_improvement: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class TrainState:
    """All that a resumed run needs. Tensors are the run's own: whoever keeps them while it goes on copies them."""

    progress: Progress
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainResult:
    progress: Progress
    state: TrainState
    finished: bool  # False: `should_stop` said so
    stopped_early: bool = False  # patience ran out


def _nothing(_: object) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to be told, and how it can stop the run.

    `score` measures the weights as they are now; a run that evaluates on its way asks it at every evaluation.
    """

    on_step: Callable[[StepMetrics], None] = _nothing
    on_eval: Callable[[EvalMetrics], None] = _nothing
    on_checkpoint: Callable[[TrainState], None] = _nothing
    should_stop: Callable[[], bool] = field(default=lambda: False)
    score: Callable[[], float] | None = None


def train(
    body: Body,
    parameters: Mapping[str, nn.Parameter],
    steps: Steps,
    loss: Loss,
    settings: Train,
    *,
    lr: float,
    held_out: Step | None = None,
    eval_every: int = 0,
    save_every: int = 0,
    hooks: Hooks | None = None,
    resume: TrainState | None = None,
    name_row: Callable[[str], str] = str,
) -> TrainResult:
    """Train `parameters` on `steps`, from the first or from where `resume` stood.

    lr                      the peak learning rate (`settings.lr` may say auto; the caller decides)
    eval_every, save_every  in steps; 0 is never. The last step is always evaluated and saved.
    name_row                example id -> how to name the row to the user
    Raises TunesmithError, naming the rows, after several steps in a row without a finite loss and gradient.
    """
    run = _Run(body, parameters, steps, loss, settings, lr, held_out, hooks or Hooks(), name_row)
    if resume is not None:
        run.restore(resume)
    return run.to_the_end(eval_every, save_every)


def evaluate(body: Body, held_out: Step, loss: Loss, step: int) -> EvalMetrics:
    """The mean loss over the held-out rows' weight, and what it says of itself."""
    training = body.model.training
    body.model.eval()  # no dropout
    with torch.no_grad():
        total, metrics = accumulate(body, held_out, loss, backward=False)
    body.model.train(training)
    return EvalMetrics(step, total / held_out.weight, means(metrics, held_out))


class _Run:
    """One run's moving parts."""

    def __init__(
        self,
        body: Body,
        parameters: Mapping[str, nn.Parameter],
        steps: Steps,
        loss: Loss,
        settings: Train,
        lr: float,
        held_out: Step | None,
        hooks: Hooks,
        name_row: Callable[[str], str],
    ) -> None:
        assert parameters, "nothing to train"
        self.body, self.parameters, self.steps, self.loss = body, parameters, steps, loss
        self.settings, self.lr, self.held_out, self.hooks, self.name_row = settings, lr, held_out, hooks, name_row
        self.optimizer = adamw(parameters, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        self.progress = Progress()

    def restore(self, state: TrainState) -> None:
        assert state.parameters.keys() == self.parameters.keys(), "the checkpoint holds other parameters"
        self.progress = state.progress
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.parameters[name])
        load_state_tensors(self.optimizer, self.parameters, state.optimizer)
        torch.set_rng_state(state.random["cpu"])
        if "cuda" in state.random:
            torch.cuda.set_rng_state(state.random["cuda"], self.body.device)

    def state(self) -> TrainState:
        random = {"cpu": torch.get_rng_state()}
        if self.body.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.body.device)
        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return TrainState(self.progress, parameters, state_tensors(self.optimizer, self.parameters), random)

    def to_the_end(self, eval_every: int, save_every: int) -> TrainResult:
        # Denormal numbers are a hundred times slower on a CPU and worth nothing here; the caller's may be.
        torch.set_flush_denormal(True)
        forget_peak(self.body.device)
        try:
            return self._train(eval_every, save_every)
        finally:
            torch.set_flush_denormal(False)

    def _train(self, eval_every: int, save_every: int) -> TrainResult:
        saved, early = -1, self._patience_ran_out()
        while self.progress.step < len(self.steps) and not early:
            self._one_step(self.steps[self.progress.step])
            step, last = self.progress.step, self.progress.step == len(self.steps)
            stop = self.hooks.should_stop()
            improved = False
            if self.held_out is not None and (last or (eval_every and step % eval_every == 0)):
                improved = self._evaluate(scored=eval_every > 0)
                early = self._patience_ran_out()
            keep_best = improved and self.settings.patience is not None
            if last or stop or early or keep_best or (save_every and step % save_every == 0):
                self.hooks.on_checkpoint(self.state())
                saved = step
            if stop and not last:
                return TrainResult(self.progress, self.state(), finished=False)
        if saved != self.progress.step:
            self.hooks.on_checkpoint(self.state())
        return TrainResult(self.progress, self.state(), finished=True, stopped_early=early)

    def _one_step(self, step: Step) -> None:
        began = time.perf_counter()
        parallel.seed(self.settings.seed, step.index)
        for parameter in self.parameters.values():
            parameter.grad = None
        total, metrics = accumulate(self.body, step, self.loss)
        norm = grad_norm(self.parameters.values())
        lr = lr_at(step.index, len(self.steps), self.lr, self.settings.schedule, self.settings.warmup_ratio)
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite:
            if norm > self.settings.max_grad_norm:
                scale_grads(self.parameters.values(), self.settings.max_grad_norm / norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self._count(step, finite)
        self.hooks.on_step(
            StepMetrics(
                step=self.progress.step,
                epoch=step.epoch,
                loss=total / step.weight,
                lr=lr,
                grad_norm=norm,
                examples=len(step.example_ids),
                tokens=step.tokens,
                computed_tokens=step.computed_tokens,
                supervised_tokens=step.supervised_tokens,
                seconds=time.perf_counter() - began,
                peak_memory_bytes=peak_bytes(self.body.device),
                measures=means(metrics, step),
                skipped=not finite,
            )
        )
        if self.progress.skipped_in_a_row >= BAD_STEPS_IN_A_ROW:
            rows = ", ".join(self.name_row(i) for i in step.example_ids[:5])
            raise TunesmithError(
                f"{BAD_STEPS_IN_A_ROW} steps in a row had a loss or gradient that is not a finite number, "
                f"the last on {rows}; lower train.lr, or look at those rows"
            )

    def _count(self, step: Step, finite: bool) -> None:
        done = self.progress
        self.progress = replace(
            done,
            step=step.index + 1,
            skipped=done.skipped + (not finite),
            skipped_in_a_row=0 if finite else done.skipped_in_a_row + 1,
        )

    def _evaluate(self, scored: bool) -> bool:
        """Measure on the held-out rows; True where they were never better: by the score where there is one."""
        assert self.held_out is not None
        measured = evaluate(self.body, self.held_out, self.loss, self.progress.step)
        if scored and self.hooks.score is not None:
            measured = replace(measured, score=self.hooks.score())
        self.hooks.on_eval(measured)
        done = self.progress
        better = math.isfinite(measured.held_out_loss) and (
            done.best_loss is None
            or _rank(measured.score, measured.held_out_loss) > _rank(done.best_score, done.best_loss)
        )
        if better:
            self.progress = replace(
                done,
                best_step=done.step,
                best_loss=measured.held_out_loss,
                best_score=measured.score,
                evals_without_improvement=0,
            )
        else:
            self.progress = replace(done, evals_without_improvement=done.evals_without_improvement + 1)
        return better

    def _patience_ran_out(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.evals_without_improvement >= patience


def _rank(score: float | None, loss: float) -> tuple[float, float]:
    """Better evaluations compare greater."""
    return (0.0 if score is None else score, -loss)
