"""Who answers in the place of the rows: the base with a long prompt, another model on this machine, or an endpoint.

A teacher of the student's own vocabulary also says how likely it finds every token (`Teacher.likeliest`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tunesmith.chat.renderer import Renderer
from tunesmith.data.batches import Layout
from tunesmith.data.prompts import read_prompt
from tunesmith.engine.engine import Engine
from tunesmith.engine.opening import engine_over
from tunesmith.errors import InputError
from tunesmith.models.folders import file_hash
from tunesmith.models.loading import LoadedBase, load_base
from tunesmith.models.lora import LoraModel, Routing, wrap
from tunesmith.models.peft_format import WEIGHTS, load_adapter
from tunesmith.prove.answering import EngineModel, Model, Weights
from tunesmith.prove.endpoint import Endpoint
from tunesmith.recipe import Compress, Distill, Recipe, is_endpoint
from tunesmith.store.runs import Located, locate
from tunesmith.train.annotate import Columns, likeliest
from tunesmith.train.bodies import make_body
from tunesmith.train.estimate import LARGEST_BUDGET, answering_limit
from tunesmith.tree.body import prepare as prepare_attention
from tunesmith.types import Message, TokenizedExample

TEACHER = "teacher"  # its adapter's name in memory
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Teacher:
    """`prompt` stands in front of all it is asked. `every_row`: it answers also the rows that have an answer."""

    name: str
    model: Model
    prompt: tuple[Message, ...] = ()
    every_row: bool = True
    likeliest: Callable[[Sequence[TokenizedExample], Advance], Columns] | None = None


def teacher_of(recipe: Recipe, base: LoadedBase, renderer: Renderer, max_tokens: int) -> Teacher:
    """The teacher that the recipe's objective names. Raises InputError, also for one of another vocabulary."""
    objective = recipe.objective
    if isinstance(objective, Compress):
        prompt = read_prompt(objective)
        return _local(recipe, base, renderer, None, max_tokens, objective.top_k, f"{base.name} with the prompt", prompt)
    assert isinstance(objective, Distill)
    if is_endpoint(objective.teacher):
        return Teacher(objective.teacher, Endpoint(objective.teacher, max_tokens))
    found = locate(objective.teacher)
    other = load_base(found.base, dtype=recipe.base.dtype, device=recipe.runtime.device)
    _refuse_other_vocabulary(base, other, objective.teacher)
    theirs = Renderer.from_tokenizer(other.tokenizer, default_system=found.system, stop_ids=other.stop_ids)
    return _local(recipe, other, theirs, found, max_tokens, objective.top_k, objective.teacher)


def _local(
    recipe: Recipe,
    base: LoadedBase,
    renderer: Renderer,
    found: Located | None,
    max_tokens: int,
    k: int,
    name: str,
    prompt: tuple[Message, ...] = (),
) -> Teacher:
    """A model in memory: it answers through the engine, and its distributions come from the training body."""
    lora, adapter, digest = LoraModel(base.model, Routing()), None, base.weights_hash
    if found is not None and found.adapter is not None:
        lora, adapter, digest = wrap(base.model), TEACHER, file_hash(found.adapter / WEIGHTS)
        load_adapter(lora, TEACHER, found.adapter)
    engine = _engine(recipe, base, renderer, lora)
    model = EngineModel(Weights(engine, adapter, digest), max_tokens)
    say = partial(_likeliest, base, lora, adapter, k)
    return Teacher(name, model, prompt, every_row=found is None, likeliest=say)


def base_itself(recipe: Recipe, base: LoadedBase, renderer: Renderer, max_tokens: int) -> EngineModel:
    """The base as it is before training, answering through the engine."""
    engine = _engine(recipe, base, renderer, LoraModel(base.model, Routing()))
    return EngineModel(Weights(engine, None, base.weights_hash), max_tokens)


def _engine(recipe: Recipe, base: LoadedBase, renderer: Renderer, lora: LoraModel) -> Engine:
    limit = answering_limit(recipe.runtime.memory_limit)
    return engine_over(base, lora, renderer, memory_limit=limit, packed=True)


def _likeliest(
    base: LoadedBase,
    lora: LoraModel,
    adapter: str | None,
    k: int,
    sequences: Sequence[TokenizedExample],
    advance: Advance,
) -> Columns:
    lora.use(adapter)
    abilities = prepare_attention(base.model)
    body = make_body(base.model) if adapter is None else make_body(base.model, lora, adapter)
    layout = Layout(LARGEST_BUDGET, abilities.share, abilities.share)
    return likeliest(body, sequences, layout, advance, k=k, vocabulary=len(base.tokenizer))


def _refuse_other_vocabulary(base: LoadedBase, teacher: LoadedBase, name: str) -> None:
    """Raises InputError where a token id means another text to the teacher, or texts are cut up otherwise."""
    mine, theirs = base.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    same_pieces = _pieces(base.tokenizer) == _pieces(teacher.tokenizer)
    if same_pieces and mine == theirs:
        return
    new = sorted(mine.keys() - theirs.keys(), key=mine.__getitem__)
    if (
        same_pieces
        and mine.items() > theirs.items()
        and {mine[token] for token in new} <= {*(base.template_tokens or ())}
    ):
        raise InputError(
            f'objective.teacher "{name}" does not know {", ".join(new)}, which the chat template brought; set '
            "base.chat_template: plain, which needs no new token"
        )
    raise InputError(
        f'objective.teacher "{name}" has another vocabulary than {base.name} ({len(theirs):,} and {len(mine):,} '
        "tokens), so its distributions say nothing to it; name a teacher of the same family, or serve this one and "
        "name it as MODEL@URL"
    )


def _pieces(tokenizer: Any) -> Any:
    """How a fast tokenizer cuts words up: its pieces and merges."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]
