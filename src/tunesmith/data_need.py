"""`tunesmith plan --data-need`: train on growing shares of the rows, measure on the held-out ones, fit the law.

Every share gets the same number of updates, so that what differs is the rows and not the training; it is judged by the
weights of its best evaluation, so that a small share is not blamed for having been seen too often. A share holds the
smaller ones. The adapter (or the model) is left as it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunesmith.data.batches import Step, StepPlan, count_steps, epoch_order, make_step
from tunesmith.data.lazy import evenly
from tunesmith.errors import InputError
from tunesmith.fitting import learning_rate
from tunesmith.preparation import Prepared
from tunesmith.progress import Reporter
from tunesmith.proof import SampleScorer, sample_scorer
from tunesmith.prove.need import Need, measured
from tunesmith.prove.verdict import title
from tunesmith.train.loop import EvalMetrics, Hooks, StepMetrics, TrainState, train
from tunesmith.train.losses import sft
from tunesmith.train.row_losses import row_losses
from tunesmith.trainable import Trainable
from tunesmith.types import TokenizedExample

DIVISORS = (8, 4, 2, 1)  # an eighth, a quarter, a half, all
FEWEST_ROWS = 64
MOST_STEPS = 96  # updates of one share; train.max_steps may say fewer
EVALUATIONS = 3  # on a share's way, the last at its end
LOSS_ROWS = 64  # held-out rows whose loss is measured
SCORED_ROWS, FEWEST_SCORED = 48, 24  # held-out rows that are answered
LONGEST_ANSWER = 256  # tokens an answer may have where it is to cost little


def measure_need(ready: Prepared, trainable: Trainable, reporter: Reporter) -> Need:
    """Train on an eighth, a quarter, a half and all of the rows. Raises InputError where there are too few."""
    began = time.monotonic()
    rows = _rows(ready)
    held_out = [*evenly(ready.held_out.examples if ready.held_out is not None else [], LOSS_ROWS)]
    if not held_out:
        raise InputError("--data-need measures on held-out rows and there are none; set data.held_out to a fraction")
    settings = ready.recipe.train
    asked = count_steps(len(rows), settings.batch_examples, settings.epochs, settings.max_steps)
    steps = min(asked, MOST_STEPS)
    used = min(len(rows), steps * settings.batch_examples)
    shares = tuple(used // divisor for divisor in DIVISORS)
    scorer = sample_scorer(ready, trainable.lora, trainable.adapter, SCORED_ROWS)
    if scorer is not None and (len(scorer.sample) < FEWEST_SCORED or scorer.max_tokens > LONGEST_ANSWER):
        reporter.say(f"only the held-out loss is measured: {title(scorer.name)} needs more rows, or shorter answers")
        scorer = None
    lr = learning_rate(ready, reporter)
    reporter.say(f"how much data is needed: {steps} steps on each of {', '.join(f'{n:,}' for n in shares)} rows")
    one = _Shares(ready, trainable, make_step(0, 0.0, held_out, trainable.layout), steps, lr, scorer, reporter)
    found = [one.measure(rows[:share]) for share in shares]
    losses = np.stack([loss for loss, _ in found], axis=1)
    measures = [measured("held-out loss", shares, losses, is_loss=True)]
    if scorer is not None:
        scores = np.stack([score for _, score in found], axis=1)
        measures.insert(0, measured(title(scorer.name), shares, scores, is_loss=False))
    return Need(len(rows), shares, steps, time.monotonic() - began, tuple(measures))


def _rows(ready: Prepared) -> list[list[TokenizedExample]]:
    """The training rows in an order of chance: each with its examples, of which a chat row may give several."""
    rows: dict[str, list[TokenizedExample]] = {}
    for example in ready.train.examples:
        rows.setdefault(example.example_id, []).append(example)
    if len(rows) < FEWEST_ROWS:
        raise InputError(
            f"--data-need compares shares of at least {FEWEST_ROWS} different training rows, and there are "
            f"{len(rows)}; collect more first"
        )
    found = list(rows.values())
    return [found[i] for i in epoch_order(len(found), 0, ready.recipe.train.seed, shuffle=True)]


class _Shares:
    """Trains on one share after another, each from the weights that were there before the first."""

    def __init__(
        self,
        ready: Prepared,
        trainable: Trainable,
        held_out: Step,
        steps: int,
        lr: float,
        scorer: SampleScorer | None,
        reporter: Reporter,
    ) -> None:
        self.ready, self.trainable, self.held_out, self.scorer = ready, trainable, held_out, scorer
        self.steps, self.lr, self.reporter = steps, lr, reporter
        self.settings = ready.recipe.train.model_copy(update={"patience": EVALUATIONS})
        self.start = {name: each.detach().clone() for name, each in trainable.parameters.items()}

    def measure(
        self, rows: Sequence[Sequence[TokenizedExample]]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The held-out rows' losses [rows] and scores [items] after training on these rows."""
        self.reporter.stage(f"{len(rows):,} rows")
        try:
            self._use(self._train([example for row in rows for example in row]))
            losses = row_losses(self.trainable.body, self.held_out.examples, self.trainable.layout)
            return losses, np.array(self.scorer.scores() if self.scorer is not None else ())
        finally:
            self._use(self.start)

    def _train(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        """The parameters of the best evaluation."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        batch = min(settings.batch_examples, len(examples))
        plan = StepPlan(examples, batch, self.steps, settings.seed, settings.shuffle, self.trainable.layout)
        best = dict[str, Tensor]()

        def keep(state: TrainState) -> None:
            if state.progress.best_step == state.progress.step:
                best.update({name: tensor.clone() for name, tensor in state.parameters.items()})

        train(
            self.trainable.body,
            self.trainable.parameters,
            plan,
            sft,
            settings,
            lr=self.lr,
            held_out=self.held_out,
            eval_every=max(1, self.steps // EVALUATIONS),
            hooks=Hooks(self._step, self._eval, keep),
            name_row=self.ready.name_row,
        )
        if not best:
            raise InputError("the held-out loss is no finite number; lower train.lr, or look at the held-out rows")
        return best

    def _use(self, parameters: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trainable.parameters.items():
                parameter.copy_(parameters[name])

    def _step(self, metrics: StepMetrics) -> None:
        self.reporter.advance(metrics.step, self.steps, f"loss {metrics.loss:.3f}")

    def _eval(self, metrics: EvalMetrics) -> None:
        self.reporter.say(f"held-out loss {metrics.held_out_loss:.3f} after {metrics.step} steps")
