"""A run's held-out rows put to its contenders: who they are and which weights they answer with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.items import items
from tunesmith.data.lazy import evenly
from tunesmith.data.schema import load_schema
from tunesmith.engine.engine import Engine
from tunesmith.engine.opening import AnyEngine, engine_over, open_engine
from tunesmith.errors import InputError
from tunesmith.models.folders import file_hash, weights_hash
from tunesmith.models.lora import LoraModel
from tunesmith.models.peft_format import WEIGHTS
from tunesmith.preparation import Prepared, read_and_split
from tunesmith.progress import Reporter
from tunesmith.prove.answering import Weights
from tunesmith.prove.contenders import TUNED, earlier_names, no_contender
from tunesmith.prove.proving import Options, Voices, answer_budget, prove_items
from tunesmith.prove.report import Report
from tunesmith.prove.sample import score_sample
from tunesmith.prove.scorers import Scorer
from tunesmith.prove.scoring import choose_scorers, needs_model
from tunesmith.prove.task import detect_task
from tunesmith.recipe import Base, Recipe
from tunesmith.store.runs import Located, Run, locate, read_json, read_metrics
from tunesmith.teaching import teaching_seconds, with_lessons
from tunesmith.train.bodies import FusedBody
from tunesmith.train.estimate import answering_limit
from tunesmith.train.forward import Body
from tunesmith.types import Example, Item

TASK_ROWS = 20_000  # rows of a side by which the task is told during training
SAMPLE = 24  # held-out rows that are answered at an evaluation during training
SAMPLE_MEMORY = 256 << 20  # bytes of their keys and values


def recipe_to_prove(run: Run, overrides: Sequence[str]) -> Recipe:
    """The recipe a run was trained by, with other ways to prove it. Raises InputError for any other override."""
    for override in overrides:
        if override.partition(".")[0].strip() not in ("prove", "runtime"):
            raise InputError(f'--set "{override}": the run is trained; only keys of prove and runtime can be set now')
    return Recipe.load(run.recipe, overrides)


def prove_run(run: Run, recipe: Recipe, reporter: Reporter) -> Report:
    """Ask every contender; leaves items.jsonl and report.json. Raises InputError where the data is another by now."""
    lineage = read_json(run.lineage)
    rows = read_and_split(recipe, lambda _: None)
    if rows.hash != lineage["split_hash"]:
        raise InputError("the data changed since this run was trained; train again to prove on it", file=run.folder)
    reporter.stage(f"engine over {recipe.base.model}")
    options = Options(
        schema=_schema(recipe),
        training_seconds=sum(row.get("seconds", 0.0) for row in read_metrics(run)) + teaching_seconds(run),
    )
    voices = _voices(run, recipe, lineage["base_weights_hash"])
    return prove_items(with_lessons(rows.held_out, run), rows.train, recipe, voices, run.folder, options, reporter)


@dataclass(frozen=True)
class SampleScorer:
    """The main scorer on a few held-out rows, answered by the weights in memory as they are when asked."""

    name: str
    sample: Sequence[Item]
    max_tokens: int
    scorer: Scorer
    lora: LoraModel
    weights: Weights

    def scores(self) -> list[float]:
        """Each row's score."""
        training = self.lora.model.training
        self.lora.model.eval()
        try:
            return score_sample(self.weights, self.sample, self.scorer, max_tokens=self.max_tokens)
        finally:
            self.lora.model.train(training)
            self.lora.use(self.weights.adapter)

    def mean(self) -> float:
        return statistics.fmean(self.scores())


def held_out_scorer(ready: Prepared, lora: LoraModel, adapter: str | None) -> SampleScorer | None:
    """What is asked at every evaluation of a run. None where nothing can be scored, or the run never evaluates.

    Raises InputError for a scorer that there isn't.
    """
    if ready.recipe.train.eval_every == 0:
        _main_scorer(ready)  # a scorer that there isn't is said before the training, not after
        return None
    return sample_scorer(ready, lora, adapter, SAMPLE)


def scoring_bytes(ready: Prepared, body: Body) -> int:
    """What `held_out_scorer` holds while a run trains: keys, values, and its own layout of the weights."""
    if ready.recipe.train.eval_every == 0 or body.sharded or _main_scorer(ready) is None:
        return 0
    return SAMPLE_MEMORY + (body.packed_bytes if isinstance(body, FusedBody) and not body.dequantised_bytes else 0)


def sample_scorer(ready: Prepared, lora: LoraModel, adapter: str | None, rows: int) -> SampleScorer | None:
    """The main scorer on `rows` of the held-out rows, evenly chosen; None where nothing can be scored."""
    scorer, base = _main_scorer(ready), ready.base
    if scorer is None:
        return None
    engine = engine_over(base, lora, ready.renderer, memory_limit=SAMPLE_MEMORY)
    budget = answer_budget(ready.recipe, ready.split.train, ready.renderer)
    sample = [*evenly(_answered(ready.split.held_out), rows)]
    return SampleScorer(scorer.name, sample, budget, scorer, lora, Weights(engine, adapter))


def _main_scorer(ready: Prepared) -> Scorer | None:
    """None without a held-out row that has an answer, and for a scorer that needs another model."""
    recipe, held_out = ready.recipe, _answered(ready.split.held_out)
    if not held_out or needs_model(recipe.prove.scorers):
        return None
    task = detect_task([*_answered(ready.split.train), *held_out], _schema(recipe))
    return choose_scorers(recipe.prove.scorers, task)[0]


def _answered(examples: Sequence[Example]) -> list[Item]:
    """The items with an answer, of at most TASK_ROWS of the rows: they are held in memory."""
    return [item for item in items(evenly(examples, TASK_ROWS)) if (item.expected or "").strip()]


def earlier(recipe: Recipe) -> dict[str, Located]:
    """The earlier runs and adapters among the recipe's contenders. Raises InputError for a name of nothing."""
    known = {name: locate(name) for name in earlier_names(recipe.prove)}
    for name, found in known.items():
        if found == Located(name):
            raise no_contender(name)
    return known


def _schema(recipe: Recipe) -> dict[str, Any] | None:
    return None if recipe.data.schema_file is None else load_schema(recipe.data.schema_file).document


def _voices(run: Run, recipe: Recipe, base_hash: str) -> Voices:
    """The base, the run's own result, and the earlier runs and adapters that the recipe names as contenders."""
    settings: dict[str, Any] = {"dtype": recipe.base.dtype, "device": recipe.runtime.device}
    settings["memory_limit"] = answering_limit(recipe.runtime.memory_limit)
    base = recipe.base
    vllm = recipe.runtime.vllm
    engine = open_engine(base.model, vllm=vllm, revision=base.revision, quantize=base.quantize, **settings)
    whole = run.tuned() == run.model
    result = Located(str(run.model)) if whole else Located(base.model, run.adapter, quantize=base.quantize)
    tuned = {TUNED: _weights(TUNED, result, base, engine, settings)}
    for name, found in earlier(recipe).items():
        tuned[name] = _weights(name, found, base, engine, settings)
    # A server's answers are not remembered: its weights may be of another type than those the hash is of.
    return Voices(Weights(engine, None, base_hash if vllm is None else None), tuned)


def _weights(name: str, found: Located, base: Base, engine: AnyEngine, settings: dict[str, Any]) -> Weights:
    """An adapter joins the engine over its base; a model of its own gets its own engine.

    A server is given none in its place: an adapter over its base that it cannot speak as is refused.
    """
    if found.adapter is None:
        return Weights(Engine(found.base, **settings), None, weights_hash(Path(found.base)))
    joins = (found.base, found.quantize) == (base.model, base.quantize)
    if not joins or (isinstance(engine, Engine) and not engine.speaks_as(found.adapter)):
        engine = Engine(found.base, adapters={name: found.adapter}, quantize=found.quantize, **settings)
    else:
        engine.add_adapter(name, found.adapter)
    return Weights(engine, name, file_hash(found.adapter / WEIGHTS) if isinstance(engine, Engine) else None)
