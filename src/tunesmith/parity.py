"""The parity gate: what was trained is what is served. An adapter that fails it is neither published nor served.

    train    a few rows, scored by the trainer's own body ─► parity.json
                                                              │
    before publishing, before serving                         ▼
             base · template · prompt · effect · log-probs · end, by the engine that will answer

"Right in the trainer, wrong in the server" comes from another base, another template, a second <s>, an adapter that
was not applied, or a stop token never learned. Each is one check here, and none needs the training data again. The last
is no fault of serving: training publishes such an adapter and says so, for it may have been meant to be that short.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tunesmith.chat.renderer import Renderer
from tunesmith.data.lazy import Lazy, evenly
from tunesmith.data.parts import asked_turns
from tunesmith.data.tokenize import render
from tunesmith.engine.engine import Engine
from tunesmith.engine.opening import engine_over
from tunesmith.engine.request import Request
from tunesmith.errors import InputError, RefusedError
from tunesmith.models.loading import LoadedBase, load_base
from tunesmith.models.lora import LoraModel, Routing, wrap
from tunesmith.models.peft_format import CONFIG, load_adapter, read_config
from tunesmith.models.vocabulary import adopt
from tunesmith.parity_facts import END, Check, Parity, Row
from tunesmith.preparation import Prepared
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, find_run, locate, read_json, write_json
from tunesmith.train import parallel
from tunesmith.train.bodies import make_body
from tunesmith.train.forward import Body, run_tree
from tunesmith.tree.body import Abilities
from tunesmith.tree.layout import build_tree
from tunesmith.types import Example, Message, TokenizedExample

ROWS = 4  # answers that are compared
LOOKED_AT = 1000  # rows among which they are looked for
TOLERANCE, TOLERANCE_HALVED = 1e-3, 5e-2  # of a log-probability; where either side computed in 16 bits
EFFECT = 1e-6  # an adapter that changes every log-probability by less does nothing: its weights are zero
LIKELY_END = 0.05  # the stop token's probability after a whole answer, in the middle row
MEMORY = 256 << 20  # bytes of keys and values
SERVED = "served"  # the adapter as it was read from disk
NOTHING = "no row is short enough to be compared"
QUESTIONS = ("What is the capital of France?", "Name three colours.", "Write one sentence about rain.")


@dataclass(frozen=True, slots=True)
class _Served:
    """What will answer: an engine, and the adapter's name in it (None: every weight was tuned)."""

    base: LoadedBase
    renderer: Renderer
    engine: Engine
    adapter: str | None


def publication_gate(
    ready: Prepared,
    lora: LoraModel,
    adapter: str | None,
    body: Body,
    abilities: Abilities,
    run: Run,
    say: Callable[[str], None],
) -> Callable[[Path], None]:
    """What `fit` calls with a folder before it is published: leaves parity.json, raises RefusedError.

    The trainer's side is the weights in memory; the engine reads the folder.
    """

    def accept(folder: Path) -> None:
        lora.model.eval()
        lora.use(adapter)
        rows = [replace(row, logprobs=trainer_logprobs(body, row)) for row in sample_rows(ready)]
        body.unpack()  # the engine has a copy of its own
        if not parallel.is_first():
            return
        if abilities.share:
            base, over = _whole(ready, lora) if body.sharded and adapter is not None else (ready.base, lora)
            parity = _judge(_serve(base, over, folder, adapter), rows, read_json(run.lineage))
        else:
            parity = Parity((Check("engine", None, f"it is not for this engine: {abilities.reason}"),), tuple(rows))
        write_json(run.parity, {**parity.to_json(), "rows": [asdict(row) for row in parity.rows]})
        if not parity.publishable:
            raise RefusedError(f"what would be served is not what was trained: {parity.reason}", gate="parity")
        if parity.reason is not None:
            say(f"`tunesmith verify` will refuse this adapter: {parity.reason}")

    return accept


def verify(name: str) -> Parity:
    """Whether a run's result, or an adapter's folder, is served as it was trained.

    A run is held to its lineage and to what the trainer said of a few rows; an adapter that comes without a run to the
    trainer's own computation, done again here. Raises InputError where there is no such run or its base can't be had.
    """
    run, folder = _find(name)
    rows: list[Row] = []
    if run is not None and run.parity.exists():
        rows = [_row(facts) for facts in read_json(run.parity)["rows"]]
    base = _base(run, folder)
    whole = run is not None and folder == run.model
    lora = LoraModel(base.model, Routing()) if whole else wrap(base.model)
    try:
        served = _serve(base, lora, folder, None if whole else SERVED)
    except InputError as error:
        return Parity((Check("adapter", False, error.reason),))
    lineage = None if run is None else read_json(run.lineage)
    return _judge(served, rows or _asked_again(served, lora, folder), lineage)


def sample_rows(ready: Prepared) -> list[Row]:
    """A few held-out rows spread over all (training rows where nothing is held out), the trainer's side still open."""
    side = evenly(ready.split.held_out or ready.split.train, LOOKED_AT)
    rendered = Lazy(len(side), lambda i: _rendered(ready.renderer, side[i], ready.limit))
    fit = [i for i, row in enumerate(rendered) if len(row.prompt_ids) + len(row.answer_ids) <= ready.limit]
    return [rendered[i] for i in evenly(fit, ROWS)]


@torch.no_grad()
def trainer_logprobs(body: Body, row: Row) -> list[float]:
    """What the body that trains makes of a row's answer."""
    ids = np.array(row.prompt_ids + row.answer_ids, dtype=np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[len(row.prompt_ids) :] = 1.0
    examples = [TokenizedExample(row.name, ids, weights)]
    return body.compute(lambda: run_tree(body, build_tree(examples), examples).scores.logprobs()).tolist()


def _whole(ready: Prepared, lora: LoraModel) -> tuple[LoadedBase, LoraModel]:
    """The base once more, for the engine: of the one that trains each worker holds a part."""
    base = load_base(str(ready.base.folder), dtype=_dtype(ready.base), device=ready.base.device.type)
    return base, wrap(base.model)


def _judge(served: _Served, rows: Sequence[Row], lineage: Mapping[str, Any] | None) -> Parity:
    pairs = [(row.prompt_ids, row.answer_ids) for row in rows]
    found = served.engine.score(pairs, served.adapter)
    bare = None if served.adapter is None else served.engine.score(pairs)
    served.engine.close()
    checks = (
        _same_base(served, lineage),
        _same_template(served, lineage),
        _same_prompts(served, rows),
        _effect(served, lineage, found, bare),
        _same_logprobs(served, rows, found, lineage),
        _end(rows, found),
    )
    return Parity(checks, tuple(rows))


def _same_base(served: _Served, lineage: Mapping[str, Any] | None) -> Check:
    if lineage is None:
        return Check("base", None, "there is no lineage.json beside it that names the base's weights")
    if served.adapter is None:
        return Check("base", None, "every weight was tuned, so it stands on no base")
    expected, actual = str(lineage["base_weights_hash"]), served.base.weights_hash
    said = f"the weights of {served.base.name} are {actual[:12]}"
    if expected != actual:
        return Check("base", False, f"{said}, not {expected[:12]}")
    trained, here = lineage.get("quantize"), served.base.quantize
    if trained != here:
        return Check("base", False, f"{said}, but quantised as {here or 'nothing'}, not {trained or 'nothing'}")
    return Check("base", True, said if here is None else f"{said}, in {here}")


def _same_template(served: _Served, lineage: Mapping[str, Any] | None) -> Check:
    if lineage is None:
        return Check("template", None, "there is no lineage.json beside it that holds the chat template")
    if lineage["chat_template_hash"] == served.renderer.template_hash:
        return Check("template", True, "the chat template is the one it was trained with")
    return Check("template", False, f"the chat template of {served.base.name} is not the one it was trained with")


def _same_prompts(served: _Served, rows: Sequence[Row]) -> Check:
    start = served.base.tokenizer.bos_token_id
    for row in rows:
        prompt = row.rendered(served.renderer)
        if start is not None and prompt[:2] == [start, start]:
            return Check(
                "prompt", False, f"the prompt of {row.name} opens with {served.base.tokenizer.bos_token} twice"
            )
        if prompt != row.prompt_ids:
            return Check(
                "prompt", False, f"the prompt of {row.name} is rendered as other tokens than it was trained on"
            )
    return Check("prompt", True, "prompts are rendered as the tokens it was trained on")


def _effect(
    served: _Served,
    lineage: Mapping[str, Any] | None,
    found: Sequence[Sequence[float]],
    bare: Sequence[Sequence[float]] | None,
) -> Check:
    if bare is None:
        assert lineage is not None
        if served.base.weights_hash == lineage["base_weights_hash"]:
            return Check("effect", False, "the weights are those of the base: training changed nothing")
        return Check("effect", True, "the weights are not those of the base")
    if not found:
        return Check("effect", None, NOTHING)
    change = _largest_difference(found, bare)
    if change < EFFECT:
        return Check("effect", False, "the adapter changes nothing that is said: its weights are zero or not applied")
    return Check("effect", True, f"it changes log-probabilities by up to {change:.2g}")


def _same_logprobs(
    served: _Served, rows: Sequence[Row], found: Sequence[Sequence[float]], lineage: Mapping[str, Any] | None
) -> Check:
    types = {str(served.base.model.dtype).removeprefix("torch."), *([] if lineage is None else [lineage["dtype"]])}
    tolerance = TOLERANCE if types == {"float32"} else TOLERANCE_HALVED
    if not rows:
        return Check("log-probs", None, NOTHING)
    apart = _largest_difference(found, [row.logprobs for row in rows])
    tokens = sum(len(row.answer_ids) for row in rows)
    said = f"trainer and engine are at most {apart:.1g} apart on {tokens} tokens of {len(rows)} answers"
    if apart <= tolerance:
        return Check("log-probs", True, said)
    return Check("log-probs", False, f"{said}; {tolerance:g} is allowed")


def _end(rows: Sequence[Row], found: Sequence[Sequence[float]]) -> Check:
    ends = [float(np.exp(scores[-1])) for row, scores in zip(rows, found, strict=True) if row.ends]
    if not ends:
        return Check(END, None, "there are no answers that end by themselves")
    middle = statistics.median(ends)
    said = f"after a whole answer the stop token has a probability of {middle:.2g} in the middle row"
    if middle >= LIKELY_END:
        return Check(END, True, said)
    return Check(END, False, f"{said}: it would go on; train longer, or see that answers end in the stop token")


def _largest_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    pairs = (pair for one, other in zip(a, b, strict=True) for pair in zip(one, other, strict=True))
    differences = [abs(x - y) for x, y in pairs]
    return float(np.max(differences))  # not a number where one of them is none, which no tolerance allows


def _rendered(renderer: Renderer, example: Example, limit: int) -> Row:
    """A row's last answer with its prompt, split where the engine would begin to answer; the start of a long text."""
    where = str(example.source)
    if example.kind == "preference":
        example = replace(example, kind="chat", messages=(*example.messages, *example.chosen))
    ids, _ = render(example, renderer, "last")[-1]
    ids = [int(token) for token in ids]
    if example.kind == "text":
        return Row(where, ids[:1], ids[1:limit], ends=False)
    if example.kind == "completion":
        assert example.prompt is not None
        prompt = renderer.completion_prompt_ids(example.prompt)
        return Row(where, prompt, ids[len(prompt) :], prompt=example.prompt)
    asked = asked_turns(example)
    prompt = renderer.prompt_ids(asked, list(example.tools))
    return Row(where, prompt, ids[len(prompt) :], messages=asked, tools=example.tools)


def _serve(base: LoadedBase, lora: LoraModel, folder: Path, adapter: str | None) -> _Served:
    """The engine as it will answer, over what lies in the folder. Raises InputError."""
    if adapter is None and base.folder.resolve() != folder.resolve():  # tuned in memory: read what was written
        base = load_base(str(folder), dtype=_dtype(base), device=base.device.type)
        lora = LoraModel(base.model, Routing())
    renderer = Renderer.from_tokenizer(base.tokenizer, stop_ids=base.stop_ids)
    engine = engine_over(base, lora, renderer, memory_limit=MEMORY, packed=True)
    if adapter is None:
        return _Served(base, renderer, engine, None)
    engine.add_adapter(SERVED, folder, pinned=True)  # read now: broken weights are refused, not asked
    return _Served(base, renderer, engine, SERVED)


def _asked_again(served: _Served, lora: LoraModel, folder: Path) -> list[Row]:
    """Answers of the engine's own to a few questions, scored by the trainer's body: for what comes without a run."""
    requests = [
        Request(messages=[{"role": "user", "content": question}], adapter=served.adapter, max_tokens=16)
        for question in QUESTIONS
    ]
    adapter = None
    if served.adapter is not None:
        adapter = "trained"
        load_adapter(lora, adapter, folder)
    body = make_body(lora.model, lora, adapter)
    rows = []
    for question, answer in zip(requests, served.engine.generate(requests), strict=True):
        messages = tuple(question.messages or ())
        prompt = served.renderer.prompt_ids(messages)
        row = Row(f'"{messages[0].get("content")}"', prompt, answer.ids, messages, ends=False)
        lora.use(adapter)
        rows.append(replace(row, logprobs=trainer_logprobs(body, row)))
    return rows


def _find(name: str) -> tuple[Run | None, Path]:
    """The run that `name` belongs to, and the folder to verify. Raises InputError."""
    path = Path(name)
    if not (path / CONFIG).is_file():
        run = find_run(name)
        return run, run.tuned()
    run = Run(path.resolve().parent)
    return (run if run.exists() else None), path


def _base(run: Run | None, folder: Path) -> LoadedBase:
    """What an adapter stands on, or the tuned model itself."""
    if run is None:
        named = read_config(folder).get("base_model_name_or_path")
        if not named:
            raise InputError(f"{CONFIG} names no base, so there is nothing to load it on", file=folder)
        base = load_base(str(named), quantize=locate(str(folder)).quantize)
        return adopt(base, folder)
    recipe = Recipe.load(run.recipe)
    if folder == run.model:
        return load_base(str(folder), dtype=recipe.base.dtype, device=recipe.runtime.device)
    section = recipe.base
    base = load_base(
        section.model,
        revision=section.revision,
        dtype=section.dtype,
        device=recipe.runtime.device,
        quantize=section.quantize,
    )
    return adopt(base, folder)


def _dtype(base: LoadedBase) -> Any:
    return str(base.model.dtype).removeprefix("torch.")


def _row(facts: dict[str, Any]) -> Row:
    messages, tools = tuple(facts.pop("messages")), tuple(facts.pop("tools"))
    return Row(**facts, messages=cast("tuple[Message, ...]", messages), tools=tools)
