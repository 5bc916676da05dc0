"""What a run trains, and how it is laid out: a new adapter, one to continue from, or every weight of the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.data.batches import Layout, StepPlan, count_steps
from tunesmith.errors import InputError, RefusedError
from tunesmith.lineage import Started
from tunesmith.models.fetch import writing
from tunesmith.models.lora import LoraModel, Routing, add_new_adapter, add_token_rows, wrap
from tunesmith.models.peft_format import load_adapter, save_adapter
from tunesmith.preparation import Prepared
from tunesmith.progress import Reporter
from tunesmith.train import parallel
from tunesmith.train.bodies import FusedBody, make_body
from tunesmith.train.estimate import bytes_per_token, choose_layout, fits_again, memory_limit
from tunesmith.train.forward import Body, ModuleBody
from tunesmith.train.sharding import full_state, saved_bytes, spread
from tunesmith.tree.body import Abilities
from tunesmith.tree.body import prepare as prepare_attention
from tunesmith.types import TokenizedExample

TUNED = "tuned"  # the adapter's name in memory


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
    abilities: Abilities

    @contextmanager
    def adapter_off(self) -> Iterator[Body]:
        """What computes the model without its adapter, while this lasts; slower than `body` does with it."""
        self.lora.use(None)
        try:
            yield ModuleBody(self.body.model) if isinstance(self.body, FusedBody) else self.body
        finally:
            self.lora.use(self.adapter)


def make_trainable(ready: Prepared, reporter: Reporter, before: Started | None = None) -> Trainable:
    """A new adapter, one to continue from, or every weight of the base; laid out under the memory limit.

    before  how a run that is resumed was computed: it keeps to that, if that still fits
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
        _add_token_rows(ready, lora)
        lora.use(TUNED)
        abilities, dropout = prepare_attention(model), section.dropout
        parameters, body = dict(lora.parameters(TUNED)), make_body(model, lora, TUNED)
        save = partial(_save_adapter, ready, lora)
        model.train(dropout > 0)
    if not abilities.share:
        reporter.say(str(abilities.reason))
    elif dropout:
        reporter.say("adapter.dropout makes shared prefixes inexact, so every row is computed in full")
    share, together = abilities.share and not dropout, ready.train.together
    if together > 1 and not abilities.share:
        raise InputError(f"{abilities.reason}, and objective {ready.recipe.objective.kind} needs two at a time")
    kept = None if before is None else _kept_limit(ready, body, parameters, before)
    if all(parallel.gather(kept is not None)) and before is not None and kept is not None:
        return Trainable(lora, adapter, body, parameters, before.layout, kept, save, abilities)
    limit = memory_limit(ready.recipe.runtime.memory_limit)
    limit //= parallel.local_size()
    shape = {"share": share, "pack": abilities.share, "together": together}
    body, layout = _lay_out(ready, body, parameters, limit, **shape)
    if layout is None:
        raise RefusedError(
            f"training does not fit in {limit / 1e9:.1f} GB: one row of the data alone takes more; "
            "raise runtime.memory_limit, or lower data.max_seq_len",
            gate="plan",
        )
    return Trainable(lora, adapter, body, parameters, layout, limit, save, abilities)


def _lay_out(
    ready: Prepared, body: Body, parameters: dict[str, nn.Parameter], limit: int, **shape: Any
) -> tuple[Body, Layout | None]:
    """How steps are laid out under `limit` bytes, the same for every worker; None where not one row fits.

    The weights are spread over the workers where the recipe says so; where it leaves it open, where all of them learn
    or where they do not fit otherwise. `parameters` then become the parts that this worker holds.
    """
    rows, asked = ready.train.examples, ready.recipe.runtime.shard
    spreads = parallel.size() > 1 and (ready.recipe.adapter is None if asked == "auto" else asked)
    layout = None if spreads else choose_layout(body, parameters, rows, limit, **shape)
    fits = all(parallel.gather(layout is not None))
    if not fits and parallel.size() > 1 and asked is not False:
        spreads, plain = True, ModuleBody(body.model, body.parameters)
        layout = choose_layout(plain, parameters, rows, limit + saved_bytes(body.model, parameters), **shape)
        if not all(parallel.gather(layout is not None)):
            return body, None
        body = spread(plain, parameters, bytes_per_token(plain, rows))
    if layout is None:
        return body, None
    first = Layout(**parallel.from_first(lambda: dataclasses.asdict(layout)))
    return body, replace(first, workers=parallel.size(), sharded=spreads, lanes=1 if spreads else first.lanes)


def _kept_limit(ready: Prepared, body: Body, parameters: Mapping[str, nn.Parameter], before: Started) -> int | None:
    """The memory limit under which a resumed run keeps its layout, in bytes; None where it can't.

    A limit that was stated and is no lower than it was held the run before; else all that is free must do. Another
    number of workers is another layout, and spread weights are laid out anew.
    """
    if before.layout.sharded or before.layout.workers != parallel.size():
        return None
    setting = ready.recipe.runtime.memory_limit
    limit = memory_limit(setting, share=1.0) // parallel.local_size()
    if setting != "auto" and limit >= before.memory_limit:
        limit = memory_limit("auto", share=1.0) // parallel.local_size()
    return limit if fits_again(body, parameters, step_plan(ready, before.layout, ready.train.examples), limit) else None


def _add_token_rows(ready: Prepared, lora: LoraModel) -> None:
    """Rows of the adapter's own for the special tokens of an installed template, unless one continued has them."""
    ids = ready.base.template_tokens
    if not ids or lora.token_rows(TUNED):
        return
    adapted = [name for name, end in lora.ends.items() if TUNED in end.adapters]
    if adapted:
        raise InputError(
            f"adapter.target_modules names {adapted[0]}, whose rows the installed chat template's tokens need for "
            "themselves; leave it out, or set base.chat_template to plain"
        )
    add_token_rows(lora, TUNED, ids)


def step_plan(ready: Prepared, layout: Layout, examples: Sequence[TokenizedExample]) -> StepPlan:
    """Every step of the run, by the recipe."""
    settings, rows = ready.recipe.train, len(examples) // layout.together
    count = count_steps(rows, settings.batch_examples, settings.epochs, settings.max_steps)
    return StepPlan(examples, settings.batch_examples, count, settings.seed, settings.shuffle, layout)


def _save_adapter(ready: Prepared, lora: LoraModel, folder: Path) -> None:
    section, base = ready.recipe.adapter, ready.base
    assert section is not None
    if not parallel.is_first():
        return
    save_adapter(lora, TUNED, folder, section, base.name, base.revision)
    if base.template_tokens is not None:  # the base on disk knows neither the template nor its tokens
        with writing(folder):
            base.tokenizer.save_pretrained(folder)


def _save_model(ready: Prepared, folder: Path) -> None:
    """Every weight, in Hugging Face layout. Where the workers hold parts of them, all call."""
    model = ready.base.model
    if ready.base.template_tokens and model.generation_config is not None:
        model.generation_config.eos_token_id = sorted(ready.renderer.stop_ids)
    weights = full_state(model)
    if parallel.is_first():
        model.save_pretrained(folder, state_dict=weights)
        ready.base.tokenizer.save_pretrained(folder)
