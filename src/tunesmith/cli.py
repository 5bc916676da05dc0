"""The command line: each command is one call of `tunesmith.pipeline`, and a way to show what came back.

Nothing heavy is imported until a command runs. Progress goes to stderr; stdout is for the result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tunesmith.disk import REFUSALS
from tunesmith.errors import InputError, InterruptedRun, LostWorkerError, TunesmithError

if TYPE_CHECKING:
    from tunesmith.recipe import Recipe
    from tunesmith.store.runs import Run

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune a small open model on your examples, with proof that it beats prompting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
runs_app = typer.Typer(help="Look after runs.", no_args_is_help=True)
models_app = typer.Typer(help="Look after bases.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
app.add_typer(models_app, name="models")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a key of the recipe.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
Vllm = Annotated[str | None, typer.Option("--vllm", metavar="URL", help="A vLLM server that answers.")]
RunFolder = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The run's folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from tunesmith import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE-or-DATA", help="A recipe, or a bare data file.")],
    fix: Annotated[Path | None, typer.Option("--fix", metavar="OUT", help="Write a cleaned copy.")] = None,
    show: Annotated[int, typer.Option("--show", metavar="N", help="Print N rows as the model sees them.")] = 0,
    set_: Sets = None,
    as_json: Json = False,
) -> None:
    """The data gate: can this data teach? Exits 3 where it blocks."""
    from tunesmith import pipeline

    report = pipeline.check(_recipe_or_data(recipe, set_), fix=fix, show=show, reporter=_reporter(as_json))
    _print(report.to_json(), as_json, lambda: report.render())
    if report.blocked:
        raise typer.Exit(3)


@app.command()
def plan(
    recipe: RecipePath,
    data_need: Annotated[
        bool, typer.Option("--data-need", help="Train on growing shares: would more rows help, and how much?")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="With --data-need: draw it as .svg or .png.")
    ] = None,
    set_: Sets = None,
    as_json: Json = False,
) -> None:
    """What it will take: tokens, time, peak memory, and whether it fits."""
    from tunesmith import pipeline

    if picture is not None and not data_need:
        raise InputError("--picture draws what --data-need measures; give both")
    loaded = _recipe(recipe, set_)
    plan = pipeline.plan(loaded, data_need=data_need, picture=picture, reporter=_reporter(as_json))
    _print(plan.to_json(), as_json, plan.render)
    if not plan.fits:
        raise typer.Exit(3)


@app.command()
def train(
    recipe: RecipePath, run: RunFolder = None, resume: Resume = False, set_: Sets = None, as_json: Json = False
) -> None:
    """Gate, then train; leaves an adapter."""
    from tunesmith import pipeline

    _print_run(pipeline.train(_recipe(recipe, set_), run, resume=resume, reporter=_reporter(as_json)), as_json)


@app.command()
def prove(
    run: RunName,
    from_items: Annotated[
        bool, typer.Option("--from-items", help="Recompute the report from items.jsonl alone.")
    ] = False,
    set_: Sets = None,
    vllm: Vllm = None,
    as_json: Json = False,
) -> None:
    """The ladder of contenders on the held-out rows, with a verdict. `--set` takes keys of prove and runtime."""
    from tunesmith import pipeline

    overrides = [*(set_ or ()), *([] if vllm is None else [f"runtime.vllm={vllm}"])]
    proof = pipeline.prove(run, from_items=from_items, overrides=overrides, reporter=_reporter(as_json))
    _print(proof.to_json(), as_json, proof.render)


@app.command()
def run(
    recipe: RecipePath, run: RunFolder = None, resume: Resume = False, set_: Sets = None, as_json: Json = False
) -> None:
    """The main job: check, plan, train, prove, card."""
    from tunesmith import pipeline
    from tunesmith.store.runs import Run

    done = pipeline.run(_recipe(recipe, set_), run, resume=resume, reporter=_reporter(as_json))
    if isinstance(done, Run):  # nothing was held out, so nothing was proved
        _print_run(done, as_json)
    else:
        _print(done.to_json(), as_json, done.render)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A base, a run, or an adapter folder.")],
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="One question; else interactive.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 512,
    beside: Annotated[bool, typer.Option("--beside-base", help="Show what the base alone says, too.")] = False,
    vllm: Vllm = None,
    as_json: Json = False,
) -> None:
    """Talk to a base, a run or an adapter."""
    from tunesmith import conversation

    talk = conversation.open_conversation(
        model, system=system, temperature=temperature, max_tokens=max_tokens, beside=beside, vllm=vllm
    )
    if prompt is None:
        if as_json:
            raise InputError("--json needs a PROMPT; an interactive chat has no one JSON document")
        conversation.interactive(talk)
        return
    if as_json:
        _print(conversation.answer_facts(talk, prompt), True, None)
        return
    conversation.speak(talk, prompt)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN-or-ADAPTER", help="A run, or an adapter's folder.")],
    as_json: Json = False,
) -> None:
    """Is it served as it was trained? Exits 3 where it is not, with the reason."""
    from tunesmith import pipeline

    parity = pipeline.verify(run)
    _print(parity.to_json(), as_json, parity.render)
    if not parity.passed:
        raise typer.Exit(3)


@app.command()
def export(
    run: RunName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[str, typer.Option("--to", help="peft | merged")] = "peft",
    as_json: Json = False,
) -> None:
    """Write a run's adapter (peft) or the base with the adapter merged in (merged)."""
    from tunesmith import pipeline

    folder = pipeline.export(run, out, to=to)
    _print({"folder": str(folder), "kind": to}, as_json, lambda: f"written: {folder}")


@runs_app.command("list")
def runs_list(as_json: Json = False) -> None:
    """Every run, the newest first."""
    from tunesmith.store.runs import list_runs

    rows = [dataclasses.asdict(summary) for summary in list_runs()]
    _print(rows, as_json, lambda: _table(rows, ("name", "base", "state", "steps", "decision", "changed", "folder")))


@runs_app.command("show")
def runs_show(run: RunName, as_json: Json = False) -> None:
    """What a run holds: its recipe, its last metrics, its verdict."""
    from tunesmith.store import runs

    found = runs.find_run(run)
    facts: dict[str, Any] = {"name": found.name, "folder": str(found.folder)}
    for key, path in (("lineage", found.lineage), ("plan", found.plan), ("report", found.report)):
        facts[key] = runs.read_json(path) if path.exists() else None
    facts["metrics"] = runs.read_metrics(found)[-3:]
    _print(facts, as_json, lambda: json.dumps(facts, indent=2, ensure_ascii=False))


@runs_app.command("compare")
def runs_compare(
    a: RunName,
    b: RunName,
    page: Annotated[Path | None, typer.Option("--page", metavar="FILE", help="Write it as an HTML page too.")] = None,
    as_json: Json = False,
) -> None:
    """Two runs' scores side by side, with the paired difference on the items both answered."""
    from tunesmith import pipeline

    comparison = pipeline.compare(a, b, page=page)
    _print(comparison.to_json(), as_json, comparison.render)


@runs_app.command("rm")
def runs_rm(run: RunName, yes: Annotated[bool, typer.Option("--yes", "-y")] = False, as_json: Json = False) -> None:
    """Delete a run's folder."""
    from tunesmith.store import runs

    found = runs.find_run(run)
    if not yes and not typer.confirm(f"delete {found.folder}?", err=True):
        raise typer.Exit(1)
    runs.remove_run(found)
    _print({"removed": str(found.folder)}, as_json, lambda: f"removed {found.folder}")


@models_app.command("list")
def models_list(as_json: Json = False) -> None:
    """The bases on disk and those the catalogue can fetch."""
    from tunesmith.models import catalogue

    rows = [dataclasses.asdict(entry) for entry in catalogue.list_models()]
    _print(rows, as_json, lambda: _table(rows, tuple(rows[0])))


@models_app.command("pull")
def models_pull(model: str, as_json: Json = False) -> None:
    """Fetch a base (a catalogue name or hub id) and make it ready."""
    from tunesmith.models import catalogue

    folder = catalogue.pull(model).folder
    _print({"model": model, "folder": str(folder)}, as_json, lambda: f"ready: {folder}")


@models_app.command("rm")
def models_rm(model: str, as_json: Json = False) -> None:
    """Delete a base from disk."""
    from tunesmith.models import catalogue

    folder = catalogue.remove(model)
    _print({"removed": str(folder)}, as_json, lambda: f"removed {folder}")


def _recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from tunesmith.recipe import Recipe

    return Recipe.load(path, overrides or ())


def _recipe_or_data(path: Path, overrides: list[str] | None) -> Recipe:
    """A recipe, or a bare data file as a recipe with every default."""
    from tunesmith.recipe import Recipe

    if path.suffix in (".yaml", ".yml"):
        return Recipe.load(path, overrides or ())
    return Recipe.of_data(path, overrides or ())


def _reporter(as_json: bool) -> Any:
    from tunesmith.progress import terminal_reporter

    return terminal_reporter(quiet=as_json)


def _print_run(done: Run, as_json: bool) -> None:
    _print(
        {"run": str(done.folder), "adapter": str(done.tuned())},
        as_json,
        lambda: f"adapter: {done.tuned()}\nnext:    tunesmith prove {done.folder}",
    )


def _print(facts: Any, as_json: bool, render: Callable[[], Any] | None) -> None:
    from tunesmith.progress import relay

    if int(os.environ.get("RANK", "0")) > 0 or relay("result", facts):  # of several workers the first speaks
        return
    if as_json or render is None:
        sys.stdout.write(json.dumps(facts, ensure_ascii=False, indent=2) + "\n")
        return
    from rich.console import Console

    shown = render()
    if isinstance(shown, str):
        typer.echo(shown)
    else:
        console = Console()
        Console(width=None if console.is_terminal else 120).print(shown)


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Any:
    from rich.table import Table

    if not rows:
        return "none yet"
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    return table


def _stop(message: str, code: int, **more: object) -> NoReturn:
    from tunesmith.progress import relay

    sys.stdout.flush()
    if relay("error", {"message": message, **more}):
        sys.exit(code)
    print(message if code == InterruptedRun.exit_code else f"tunesmith: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run the command; every error a user can meet ends as one sentence and its exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(prog_name="tunesmith")
    except TunesmithError as error:
        lost, gate = isinstance(error, LostWorkerError), getattr(error, "gate", None)
        _stop(str(error), error.exit_code, lost=lost, gate=gate)
    except SystemExit as ended:
        if ended.code == InterruptedRun.exit_code:  # typer makes this of a KeyboardInterrupt
            _stop("interrupted", InterruptedRun.exit_code)
        raise
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{(error.strerror or 'cannot be written').lower()}; nothing half-written was kept", 2)


if __name__ == "__main__":
    main()
