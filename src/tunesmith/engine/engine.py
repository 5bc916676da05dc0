"""The one engine: it answers for evaluation, chat and the server, so what was proved is what is served.

    engine = Engine("smollm2-135m-instruct", adapters={"addresses": "runs/addresses/adapter"})
    answers = engine.generate([Request(messages=[...], adapter="addresses"), Request(prompt_ids=[1, 2, 3])])

There is no thread of its own: whoever waits for an answer steps the engine, and every step serves all requests of all
threads. Inside (core.py) there are only token ids; completer.py is the bridge from messages.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.chat.renderer import Renderer
from tunesmith.engine.completer import Completer, Limits, PromptRenderer
from tunesmith.engine.constraint import Grammars
from tunesmith.engine.core import Core, Settings
from tunesmith.engine.generation import Generation
from tunesmith.engine.pending import Pending
from tunesmith.engine.request import Answer, Delta, Request
from tunesmith.errors import InputError
from tunesmith.models.loading import Device, Dtype, load_base
from tunesmith.models.lora import LoraModel, wrap
from tunesmith.models.vocabulary import adopt, brought_template
from tunesmith.recipe import Quantize
from tunesmith.tree.body import prepare

MAX_BATCH = 64  # sequences in one step
AT_ONCE = 256  # requests of one call that are in the engine at a time


class Engine:
    """Answers requests over one base and any number of adapters. Safe to share between threads.

    Attributes: `renderer`, `context_length` (tokens), `name` of the base.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        system: str | None = None,
        revision: str | None = None,
        dtype: Dtype = "auto",
        device: Device | str = "auto",
        quantize: Quantize | None = None,
        memory_limit: int | None = None,
        adapter_memory_limit: int | None = None,
        max_batch: int = MAX_BATCH,
    ) -> None:
        """`model` is a catalogue name, hub id, folder or .gguf file; adapters are PEFT-format folders by name.

        `system` is the system prompt of conversations without one; `quantize` as in the recipe: an adapter is answered
        with over the base it was trained over. Over int8, on x86, integers are multiplied, several times as fast.
        `memory_limit` bounds keys and values, `adapter_memory_limit` the adapters in memory, in bytes.
        Raises InputError.
        """
        if quantize is not None and quantize not in get_args(Quantize):
            raise InputError(
                f'quantize is "{quantize}"; it must be one of {", ".join(get_args(Quantize))}, or left out'
            )
        base = load_base(str(model), revision=revision, dtype=dtype, device=device, quantize=quantize)
        for folder in (adapters or {}).values():
            base = adopt(base, Path(folder))
        renderer = Renderer.from_tokenizer(base.tokenizer, default_system=system, stop_ids=base.stop_ids)
        settings = _settings(memory_limit, adapter_memory_limit, max_batch, packed=True, int8=quantize == "int8")
        self._start(wrap(base.model), renderer, base.tokenizer, base.context_length, base.name, settings)
        self._adopted = base.template_tokens is not None
        for name, folder in (adapters or {}).items():
            self.add_adapter(name, folder)

    @classmethod
    def over(
        cls,
        lora: LoraModel,
        renderer: PromptRenderer,
        *,
        context_length: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "model",
        memory_limit: int | None = None,
        adapter_memory_limit: int | None = None,
        max_batch: int = MAX_BATCH,
        packed: bool = False,
    ) -> Engine:
        """An engine over a model in memory, nothing copied: training evaluates with it. `tokenizer` is for grammars.

        `packed` makes the copy of the base's weights that answers faster; the base itself must not change then. The
        adapters it carries answer by their names, with the weights they have when asked: every call of `generate`,
        `stream` or `logprobs` starts with an empty cache.
        """
        engine = cls.__new__(cls)
        settings = _settings(memory_limit, adapter_memory_limit, max_batch, packed=packed)
        engine._start(lora, renderer, tokenizer, context_length, name, settings)
        engine._live = True
        return engine

    def _start(
        self,
        lora: LoraModel,
        renderer: PromptRenderer,
        tokenizer: PreTrainedTokenizerBase | None,
        context_length: int,
        name: str,
        settings: Settings,
    ) -> None:
        abilities = prepare(lora.model)
        if not abilities.share:
            raise InputError(f"{name} cannot be run by the engine: {abilities.reason}")
        context_length = min(context_length, steady_context(lora.model))
        self.renderer, self.context_length, self.name = renderer, context_length, name
        self._live = self._adopted = False
        self._lock = threading.Lock()
        self._core = Core(lora, name, settings)
        vocabulary = self._core.vocabulary
        grammars = Grammars(tokenizer, renderer.stop_ids, vocabulary)
        self._completer = Completer(renderer, Limits(context_length, vocabulary), grammars)

    def generate(self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None) -> list[Answer]:
        """Answer all requests, in order. `progress(done, of)` is called as answers become ready. Raises InputError."""
        answers: dict[int, Answer] = {}
        caller = object()
        for pending in self._drive(self._pending(request, caller, index) for index, request in enumerate(requests)):
            answers[pending.index] = pending.answer(self._completer)
            if progress is not None:
                progress(len(answers), len(requests))
        return [answers[index] for index in range(len(requests))]

    def keeps(self, request: Request, ids: Sequence[int]) -> bool:
        """Whether the request's grammar would leave a greedy answer chosen without it as it is. Raises InputError."""
        return self._completer.keeps(request, ids)

    def stream(self, request: Request) -> Iterator[Delta]:
        """Answer one request piece by piece; leaving the loop cancels it. Raises InputError."""
        self._begin()
        pending = self._pending(request, object(), streaming=True)
        with self._lock:
            self._core.submit(pending.generations)
        try:
            while not pending.given:
                self._step(pending)
                yield from pending.deltas(self._completer)
        finally:
            self._abandon([pending])

    def logprobs(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], adapter: str | None = None) -> list[float]:
        """Natural log-probabilities of an answer's tokens after a prompt. Raises InputError."""
        return self.score([(prompt_ids, answer_ids)], adapter)[0]

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: str | None = None
    ) -> list[list[float]]:
        """`logprobs` of many (prompt_ids, answer_ids) at once; prompts that begin alike are computed once."""
        scores: list[list[float]] = [[] for _ in pairs]
        caller = object()
        scorings = (self._scoring(*pair, adapter, caller, index) for index, pair in enumerate(pairs) if len(pair[1]))
        for pending in self._drive(scorings):
            scores[pending.index] = pending.generations[0].scores
        return scores

    def add_adapter(self, name: str, folder: str | Path, *, pinned: bool = False) -> None:
        """Register a PEFT-format adapter folder under a name. Raises InputError where it does not fit the base.

        That costs a look at its header; its weights are loaded when they are asked for. When memory for adapters is
        short the least recently used is unloaded; a `pinned` one is loaded at once and stays. One that brings a chat
        template of its own is given to `Engine(...)`, which then speaks by it.
        """
        if not self.speaks_as(Path(folder)):
            raise InputError(
                "the adapter and this engine speak by different chat templates; give it to an engine of its own, "
                "Engine(base, adapters={name: folder})",
                file=Path(folder),
            )
        with self._lock:
            self._core.adapters.add(name, Path(folder), pinned, self._core.busy)

    def speaks_as(self, folder: Path) -> bool:
        """Whether an adapter was trained with the chat template that this engine renders by."""
        brought = brought_template(folder)
        return not self._adopted if brought is None else brought == getattr(self.renderer, "template", None)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter and all that was computed with it. Raises InputError if unknown or answering just now."""
        with self._lock:
            self._core.remove_adapter(name)

    def close(self) -> None:
        """Cancel what is running and free the cache; adapters are taken off the model."""
        with self._lock:
            self._core.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _drive(self, upcoming: Iterator[Pending]) -> Iterator[Pending]:
        """Submit what is upcoming, a bounded number at a time, and yield each as it is finished."""
        self._begin()
        open_ones: list[Pending] = []
        more = True
        try:
            while more or open_ones:
                while more and len(open_ones) < AT_ONCE:
                    pending = next(upcoming, None)
                    if pending is None:
                        more = False
                        break
                    with self._lock:
                        self._core.submit(pending.generations)
                    open_ones.append(pending)
                if open_ones:
                    self._step(open_ones[0])
                finished = [pending for pending in open_ones if pending.finished]
                open_ones = [pending for pending in open_ones if not pending.finished]
                yield from finished
        finally:
            self._abandon(open_ones)

    def _step(self, pending: Pending) -> None:
        with self._lock:
            if not pending.finished:  # another thread may have stepped it to its end meanwhile
                self._core.step()

    def _begin(self) -> None:
        """Weights in memory may have changed since the last call, so nothing computed with them is kept."""
        with self._lock:
            if self._live and self._core.idle:
                self._core.reset()
                self._core.adapters.refresh()

    def _abandon(self, pendings: Sequence[Pending]) -> None:
        with self._lock:
            for pending in pendings:
                for generation in pending.generations:
                    self._core.cancel(generation)

    def _pending(self, request: Request, caller: object, index: int = 0, streaming: bool = False) -> Pending:
        key = self._core.adapters.key(request.adapter)
        generations = self._completer.generations(request, key, caller)
        return Pending(index, generations, [self._completer.tracker(request, streaming, g) for g in generations])

    def _scoring(
        self, prompt: Sequence[int], answer: Sequence[int], adapter: str | None, caller: object, index: int
    ) -> Pending:
        self._completer.check_tokens(prompt, "prompt")
        ids = [*prompt, *answer]
        self._completer.check_tokens(ids, "prompt with its answer")
        key = self._core.adapters.key(adapter)
        generation = Generation(ids, 0, adapter=adapter, cache_key=key, scored_from=len(prompt), caller=caller)
        return Pending(index, [generation], [None])


def steady_context(model: PreTrainedModel) -> int:
    """Tokens up to which each sequence's rotary angles are its own.

    Beyond it "dynamic" and "longrope" turn the whole step by its longest sequence: answers would change with
    their batch.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in (parameters, *parameters.values()) if isinstance(each, dict)]  # some by kind of layer
    limits = [
        int(each.get("original_max_position_embeddings") or config.max_position_embeddings)
        for each in kinds
        if each.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=sys.maxsize)


def _settings(
    memory_limit: int | None, adapter_memory_limit: int | None, max_batch: int, *, packed: bool, int8: bool = False
) -> Settings:
    """Limits not given: an eighth of the machine's memory each, between 256 MB and 2 GB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usual = min(max(total // 8, 256 << 20), 2 << 30)
    return Settings(memory_limit or usual, adapter_memory_limit or usual, max_batch, packed=packed, int8=int8)
