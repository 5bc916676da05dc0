"""The path from a recipe to a verdict: check -> plan -> train -> prove. What a reader opens first.

Each public function is one command of the same name and returns the same facts as typed objects. `training` knows
nothing of the engine and `proof` nothing of the loop: they meet here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from tunesmith import parity, workers
from tunesmith.data.checks import check as check_rows
from tunesmith.data.checks import gate
from tunesmith.data.fix import write_fixed
from tunesmith.data.look import show_rows
from tunesmith.data.report import DataReport
from tunesmith.data.rules.suspicion import loss_outlier
from tunesmith.data_need import measure_need
from tunesmith.errors import InputError, RefusedError
from tunesmith.fitting import base_losses, fit, plan_run
from tunesmith.home import home
from tunesmith.lineage import Started, started
from tunesmith.models.catalogue import on_disk
from tunesmith.models.loading import load_base, pick_device
from tunesmith.models.lora import wrap
from tunesmith.models.memory import release_memory
from tunesmith.models.merge import merge
from tunesmith.models.peft_format import load_adapter
from tunesmith.models.vocabulary import adopt
from tunesmith.parity import publication_gate
from tunesmith.parity_facts import Parity
from tunesmith.planning import Plan
from tunesmith.preparation import Prepared, prepare, read_and_split, renderer_on_disk
from tunesmith.progress import Reporter
from tunesmith.proof import earlier, held_out_scorer, prove_run, recipe_to_prove, scoring_bytes
from tunesmith.prove.card import write_card
from tunesmith.prove.compare import Comparison, compare_reports
from tunesmith.prove.compare_page import render_comparison
from tunesmith.prove.need import refuse_picture, write_picture
from tunesmith.prove.page import write_page
from tunesmith.prove.report import Report, report_from_items, write_report
from tunesmith.recipe import Recipe
from tunesmith.stopping import part_of, stopping, stopping_proof
from tunesmith.store.runs import (
    Run,
    alone,
    create_run,
    find_run,
    read_json,
    read_metrics,
    refuse_taken,
    write_json,
    write_text,
)
from tunesmith.train import parallel
from tunesmith.train.methods import method_of
from tunesmith.trainable import TUNED, make_trainable


def check(recipe: Recipe, *, fix: Path | None = None, show: int = 0, reporter: Reporter | None = None) -> DataReport:
    """The data gate. `fix` writes a cleaned copy there; `show` shows that many rows as the model sees them.

    Rules that need the base's tokenizer are left out, and it is said, where the base isn't on this machine.
    """
    reporter = reporter or Reporter()
    renderer = renderer_on_disk(recipe)
    if renderer is None:
        pull = f"tunesmith models pull {recipe.base.model}"
        reporter.say(f"rules about tokens are left out: the base is not on this machine (`{pull}` fetches it)")
    report = gate(
        recipe.data, renderer, limit=_row_limit(recipe), say=reporter.say, inputs=method_of(recipe.objective).taught
    )
    if fix is not None:
        reporter.say(write_fixed(report, fix))
    if show:
        if renderer is None:
            raise InputError(
                f"--show needs the base's tokenizer; fetch it with `tunesmith models pull {recipe.base.model}`"
            )
        reporter.show(show_rows(report.split.train, renderer, show, recipe.data.train_on))
    return report


def plan(
    recipe: Recipe, *, data_need: bool = False, picture: Path | None = None, reporter: Reporter | None = None
) -> Plan:
    """What the run will take, from its rows and a few seconds of measuring on this machine, in as many workers.

    `data_need` trains on growing shares of the rows and says how much more data would help; `picture` gets that as
    .svg or .png. Raises InputError where that can't be measured.
    """
    reporter = reporter or Reporter()
    if picture is not None:
        refuse_picture(picture)
    if data_need and method_of(recipe.objective).taught:
        raise InputError(
            f"--data-need measures on answers, and objective {recipe.objective.kind} has them given by a teacher; "
            "leave it out"
        )
    planned = workers.plan_in_workers(recipe, reporter) if workers.wanted(recipe) else None
    if planned is not None and not (data_need and planned.fits):
        return planned
    with parallel.team(pick_device(recipe.runtime.device)):
        ready, _ = _prepare(recipe, reporter)
        trainable = make_trainable(ready, reporter)
        planned = planned or plan_run(ready, trainable, scoring_bytes(ready, trainable.body))
        if not data_need or not planned.fits:
            return planned
        reporter.say(planned.sentence())
        need = measure_need(ready, trainable, reporter)
    if picture is not None and parallel.leads():
        write_picture(need, picture)
    return replace(planned, need=need)


def train(recipe: Recipe, folder: Path | None = None, *, resume: bool = False, reporter: Reporter | None = None) -> Run:
    """Gate, plan, then train; leaves an adapter in the run's folder ($TUNESMITH_HOME/runs/NAME by default).

    Raises InputError for bad input (nothing is left behind then), RefusedError where a gate (data, plan, parity) says
    no, and InterruptedRun after a signal.
    """
    reporter = reporter or Reporter()
    place = folder or home() / "runs" / recipe.name
    refuse_taken(place, resume=resume)
    before = started(Run(place), recipe) if resume else None
    if workers.wanted(recipe):
        workers.train_in_workers(recipe, place, resume=resume, reporter=reporter)
    else:
        with parallel.team(pick_device(recipe.runtime.device)):
            _train(recipe, place, before, resume, reporter)
    return Run(place)


def _train(recipe: Recipe, place: Path, before: Started | None, resume: bool, reporter: Reporter) -> None:
    """In this process, which may be one of several."""
    ready, report = _prepare(recipe, reporter, Run(place), before.threads if before else None)
    trainable = make_trainable(ready, reporter, before)
    planned = plan_run(ready, trainable, scoring_bytes(ready, trainable.body))
    reporter.say(planned.sentence())
    if not planned.fits:
        raise RefusedError(planned.refusal(), gate="plan")
    score = None
    if trainable.body.sharded:
        reporter.say(
            "the weights are spread over the workers, so evaluations during training give the held-out loss alone"
        )
    else:
        score = held_out_scorer(ready, trainable.lora, trainable.adapter)
    surprises = [*loss_outlier(*base_losses(ready, trainable))]
    for note in surprises:
        reporter.say(f"{note.rule}: {note.reason}; {note.remedy}")
    run = Run(place)
    if parallel.is_first():
        create_run(place, resume=resume)
    parallel.wait()
    with alone(run) if parallel.is_first() else nullcontext(), stopping(run):
        if parallel.is_first():
            write_json(run.data_report, report.with_notes(surprises).to_json())
        what = (trainable.lora, trainable.adapter, trainable.body, trainable.abilities)
        accept = publication_gate(ready, *what, run, reporter.say)
        mean = None if score is None else score.mean
        fit(ready, trainable, planned, run, resume=resume, reporter=reporter, accept=accept, score=mean)
        parallel.wait()  # the first worker publishes


def verify(name: str | Path) -> Parity:
    """Whether a run's adapter (or an adapter's folder) is served as it was trained. Raises InputError."""
    return parity.verify(str(name))


def prove(
    name: str | Path,
    *,
    from_items: bool = False,
    overrides: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Report:
    """The ladder of contenders on a run's held-out rows. `from_items`: every number again from items.jsonl alone.

    `overrides`: `prove.key=value` or `runtime.key=value`, instead of the run's own. Raises InputError.
    """
    reporter = reporter or Reporter()
    run = find_run(str(name))
    recipe = recipe_to_prove(run, overrides)
    if from_items:
        report = report_from_items(run.items)
        write_report(report, run.report)
    elif method_of(recipe.objective).has_answers:
        with stopping_proof(run, overrides):
            report = prove_run(run, recipe, reporter)
    else:
        raise InputError(_loss_sentence(run), file=run.folder)
    write_page(run, report)
    write_card(run, report)
    reporter.say(f"report:  {run.page}\nadapter: {run.tuned()}")
    return report


def run(
    recipe: Recipe, folder: Path | None = None, *, resume: bool = False, reporter: Reporter | None = None
) -> Report | Run:
    """The main job: check, plan, train, prove, card. The run alone where there is nothing to prove.

    That is where nothing is held out, or the rows are texts: their measure is the held-out loss, before and after.
    """
    reporter = reporter or Reporter()
    earlier(recipe)  # a contender that there isn't is said before the training, not after
    with part_of("run"):
        done = train(recipe, folder, resume=resume, reporter=reporter)
    if recipe.data.held_out == 0:
        reporter.say("data.held_out is 0: everything was trained on, so there is nothing to prove")
        return done
    if not method_of(recipe.objective).has_answers:
        reporter.say(_loss_sentence(done))
        return done
    if not parallel.leads():
        return done  # the first worker proves alone
    release_memory()
    return prove(done.folder, reporter=reporter)


def _loss_sentence(run: Run) -> str:
    """What there is to say of texts, which ask nothing: `held-out loss 3.21 before training, 2.80 after ...`."""
    rows = [row for row in read_metrics(run) if "held_out_loss" in row]
    losses = [row.get("held_out_nll", row["held_out_loss"]) for row in rows]  # without what a leash to the base costs
    why = "texts ask nothing, so there are no answers to prove"
    if not losses:
        return why
    before, after = losses[0], losses[-1]
    perplexity = f"perplexity {math.exp(before):.1f}, {math.exp(after):.1f}"
    return f"held-out loss {before:.3f} before training, {after:.3f} after ({perplexity}); {why}"


def compare(a: str, b: str, *, page: Path | None = None) -> Comparison:
    """Two proved runs side by side, paired on the items both answered; `page` gets it as HTML. Raises InputError."""
    reports = [report_from_items(find_run(name).items) for name in (a, b)]
    short = Path(a).name, Path(b).name
    comparison = compare_reports(*reports, names=short if short[0] != short[1] else (a, b))
    if page is not None:
        if page.exists():
            raise InputError("there is something here already; name a new file", file=page)
        write_text(page, render_comparison(comparison))
    return comparison


def export(name: str | Path, out: Path, *, to: str) -> Path:
    """Write a run's result for others: `peft` the adapter, `merged` a model in Hugging Face layout."""
    run = find_run(str(name))
    tuned = run.tuned()
    if to not in ("peft", "merged"):
        raise InputError(f'--to "{to}" is not known; it is peft or merged')
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError("there is something here already; name a new or empty folder", file=out)
    if to == "peft" or tuned == run.model:
        if to == "peft" and tuned == run.model:
            raise InputError(
                "this run tuned every weight, so there is no adapter; export it --to merged", file=run.folder
            )
        shutil.copytree(tuned, out, dirs_exist_ok=True)
        return out
    recipe = Recipe.load(run.recipe)
    section = recipe.base
    base = load_base(
        section.model, revision=section.revision, dtype=section.dtype, device="cpu", quantize=section.quantize
    )
    base = adopt(base, tuned)
    lora = wrap(base.model)
    load_adapter(lora, TUNED, tuned)
    merge(lora, TUNED).save_pretrained(out)
    base.tokenizer.chat_template = read_json(run.lineage)["chat_template"]
    base.tokenizer.save_pretrained(out)
    return out


def _prepare(
    recipe: Recipe, reporter: Reporter, run: Run | None = None, threads: int | None = None
) -> tuple[Prepared, DataReport]:
    """Read, gate and tokenise; with so many `threads` where the recipe leaves it open.

    `run` keeps what a teacher answers. Raises RefusedError where the gate blocks.
    """
    if recipe.runtime.threads != "auto":
        threads = recipe.runtime.threads
    if threads is not None:
        torch.set_num_threads(threads)
    reporter.stage("data")
    rows = read_and_split(recipe, reporter.say)
    if on_disk(recipe.base.model, recipe.base.revision) is None:
        load_base(recipe.base.model, revision=recipe.base.revision)  # fetches it, and says so
    report = check_rows(rows, recipe.data, renderer_on_disk(recipe), limit=_row_limit(recipe))
    reporter.show(report.render())
    if report.blocked:
        raise RefusedError(
            f"{report.summary()}; `tunesmith check` shows the rows, and `--fix OUT` writes a cleaned copy", gate="data"
        )
    return prepare(recipe, rows, reporter, run), report


def _row_limit(recipe: Recipe) -> int | None:
    """The longest row the gate lets pass, in tokens, where the recipe says one and longer ones are not cut up."""
    return None if method_of(recipe.objective).pieces else recipe.data.max_seq_len
