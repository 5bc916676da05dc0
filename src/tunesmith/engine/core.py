"""The engine's inside: token ids in, token ids out. Knows nothing of messages or text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.engine.adapters import Adapters
from tunesmith.engine.attention import Below, CacheContext, Span
from tunesmith.engine.body import Body, PlainBody, packed_body
from tunesmith.engine.cache import KvSpec, LayerShape, Node
from tunesmith.engine.generation import Generation
from tunesmith.engine.head import AdaptedHead
from tunesmith.engine.packing import choose_packing, pack_head
from tunesmith.engine.projection import Segment
from tunesmith.engine.request import BusyError
from tunesmith.engine.sampling import Choice, choose
from tunesmith.engine.scheduler import Chunk, Plan, Scheduler
from tunesmith.errors import InputError
from tunesmith.models.lora import LoraModel
from tunesmith.tree.body import run_body
from tunesmith.tree.heads import head_of

SCORED_AT_ONCE = 64  # rows of logits that exist at a time while scoring


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine may take. `packed`: a second copy of the base's weights, laid out for speed, where it has one."""

    memory_limit: int  # bytes of keys and values
    adapter_memory_limit: int
    max_batch: int = 64  # sequences in one step
    step_tokens: int = 256  # tokens in one step; more prompt tokens at once are hardly faster, but make decoding wait
    max_waiting: int = 4096  # sequences in the queue
    packed: bool = True
    int8: bool = False  # that copy of a base in int8: its integers


class Core:
    """Runs generations over one model. Not for several threads at once: the caller locks."""

    def __init__(self, lora: LoraModel, name: str, settings: Settings) -> None:
        self.device = lora.model.device
        self.settings = settings
        spec = kv_spec(lora)
        head = head_of(lora.model)
        if lora.head is not None:  # the base's own, whatever adapter the model is set to
            head = replace(head, weight=lora.head.dense(), own=None)
        self.vocabulary = head.weight.shape[0]
        packing = choose_packing(lora, settings.int8)
        body = packed_body(lora, spec, packing, settings.adapter_memory_limit) if settings.packed else None
        self._body: Body = body or PlainBody(lora)
        tables, limit = (None, settings.adapter_memory_limit) if body is None else (body.tables, body.tables.limit)
        self.adapters = Adapters(lora, name, tables, limit)
        self._head = AdaptedHead(head, lora.head, None if body is None else pack_head(head, packing))
        self.scheduler = Scheduler(
            spec,
            memory_limit=settings.memory_limit,
            max_batch=settings.max_batch,
            step_tokens=settings.step_tokens,
            ready=self.adapters.ready,
        )

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    @property
    def generations(self) -> list[Generation]:
        """All that wait or run."""
        return [*self.scheduler.waiting, *self.scheduler.running]

    def submit(self, generations: Sequence[Generation]) -> None:
        """Put the generations of a request in the queue. Raises BusyError where it is full; then none is in it."""
        if len(self.scheduler.waiting) + len(generations) > self.settings.max_waiting:
            raise BusyError(f"{len(self.scheduler.waiting)} requests are waiting already; ask again later")
        self.scheduler.waiting.extend(generations)

    def cancel(self, generation: Generation) -> None:
        """End a generation now; what it has generated stands."""
        if generation.finish_reason is None:
            generation.finish_reason = "cancelled"
            self.scheduler.leave(generation)

    @property
    def busy(self) -> set[str]:
        """The adapters of all generations."""
        return {generation.adapter for generation in self.generations if generation.adapter is not None}

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter and what was computed with it. Raises InputError where it is unknown or in use."""
        key = self.adapters.key(name)
        if name in self.busy:
            raise InputError(f'adapter "{name}" is answering requests; remove it when they are done')
        self.scheduler.tree.forget(key)
        self.adapters.remove(name)

    def reset(self) -> None:
        """Cancel everything and start with an empty cache."""
        for generation in self.generations:
            self.cancel(generation)
        self.scheduler.clear()

    def close(self) -> None:
        """Cancel everything and give back what it took; adapters are taken off the model."""
        self.reset()
        self.scheduler.free()
        self.adapters.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Run the model once over the next tokens of every running generation."""
        self._cancel_late()
        plan = self.scheduler.plan()
        chunks = plan.chunks
        if not chunks:
            assert not self.scheduler.running
            return
        hidden = self._run(plan)
        self.scheduler.advance(plan)
        ends: list[int] = []  # the rows that say what comes next, one after the last token and one after each guess
        ready: list[Chunk] = []
        row = 0
        for chunk in chunks:
            first, row = row, row + chunk.rows
            if chunk.generation.scored_from is not None:
                self._score(chunk, hidden[first:row])
            elif chunk.stop == chunk.generation.length:
                ends += range(row - 1 - len(chunk.guesses), row)
                ready.append(chunk)
        if ready:
            sequences = [chunk.generation for chunk in ready for _ in range(1 + len(chunk.guesses))]
            logits = self._head.logits(hidden[ends], [sequence.adapter for sequence in sequences]).float()
            choices = iter(choose(logits, sequences))
            for chunk in ready:
                _take(chunk, [next(choices) for _ in range(1 + len(chunk.guesses))])
        for generation in dict.fromkeys(chunk.generation for chunk in chunks):
            if generation.finish_reason is not None:
                self.scheduler.leave(generation)

    def _cancel_late(self) -> None:
        """What is past its deadline ends with what it has."""
        now = time.monotonic()
        for generation in self.generations:
            if generation.deadline <= now:
                self.cancel(generation)

    def _run(self, plan: Plan) -> Tensor:
        """The step's rows through the model: hidden states [rows, hidden]."""
        chunks = plan.chunks
        ids = torch.tensor([token for c in chunks for token in c.tokens], device=self.device)
        positions = torch.tensor([p for c in chunks for p in range(c.start, c.start + c.rows)], device=self.device)
        return self._body(ids, positions, self._context(plan, positions), _segments(chunks))

    def _context(self, plan: Plan, positions: Tensor) -> CacheContext:
        spans: list[Span] = []
        below: dict[Node, list[int]] = {}
        row, decoding = 0, sum(chunk.rows for chunk in plan.decode)
        for chunk in plan.chunks:
            stop = row + chunk.rows
            generation, node = chunk.generation, chunk.node
            if row >= decoding:
                store = self.scheduler.slots.slot(generation.slot) if node is None else node.kv
                assert generation.node is not None
                spans.append(
                    Span(row, stop, store, chunk.start - (generation.node.end if node is None else node.start))
                )
            for seen in chunk.seen_nodes():
                below.setdefault(seen, []).extend(range(row, stop))
            row = stop
        own = [(c.generation.slot, c.generation.tail + i, i) for c in plan.decode for i in range(c.rows)]
        slot_index, offsets, turns = torch.tensor(own, dtype=torch.long, device=self.device).reshape(-1, 3).unbind(1)
        return CacheContext(
            positions=positions,
            slots=self.scheduler.slots,
            slot_index=slot_index,
            offsets=offsets,
            turns=turns,
            spans=spans,
            below=[Below(node, torch.tensor(rows, device=self.device)) for node, rows in below.items()],
        )

    def _score(self, chunk: Chunk, hidden: Tensor) -> None:
        """Log-probabilities of the tokens that follow the chunk's rows, from `scored_from` on."""
        generation = chunk.generation
        assert generation.scored_from is not None
        first = max(chunk.start, generation.scored_from - 1)
        targets = generation.prompt[first + 1 : chunk.stop + 1]
        for done in range(0, len(targets), SCORED_AT_ONCE):
            some = torch.tensor(targets[done : done + SCORED_AT_ONCE], device=self.device)
            rows = hidden[first - chunk.start + done :][: len(some)]
            logits = self._head.logits(rows, [generation.adapter] * len(some))
            logprobs = torch.log_softmax(logits.float(), -1)
            generation.scores += logprobs[torch.arange(len(some)), some].tolist()
        if chunk.stop == generation.length:
            generation.finish_reason = "stop"


def kv_spec(lora: LoraModel) -> KvSpec:
    """Ask the model what it keeps of a token, by running one."""
    probe = _ShapeProbe()
    ids = torch.zeros(1, dtype=torch.long, device=lora.model.device)
    with torch.no_grad():
        run_body(lora.model, ids, ids, probe)
    layers = [probe.shapes[layer] for layer in range(len(probe.shapes))]
    return KvSpec(layers, probe.dtype, lora.model.device)


class _ShapeProbe:
    """An attention context that notes the shapes of keys and values."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.dtype = torch.float32

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **settings: object) -> Tensor:
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self.dtype = value.dtype
        return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2)


def _take(chunk: Chunk, choices: Sequence[Choice]) -> None:
    """Go on with what the model said, as far as the guesses it was said after were right."""
    generation = chunk.generation
    for place, choice in enumerate(choices):
        generation.take(choice)
        if generation.finish_reason is not None or [choice.token] != [*chunk.guesses[place : place + 1]]:
            return
        generation.tail += 1  # the guess's keys and values are the token's
        generation.computed += 1


def _segments(chunks: Sequence[Chunk]) -> tuple[Segment, ...]:
    """Runs of rows of one adapter."""
    segments: list[Segment] = []
    row = 0
    for chunk in chunks:
        stop = row + chunk.rows
        name = chunk.generation.adapter
        if name is not None:
            if segments and segments[-1][0] == name and segments[-1][2] == row:
                segments[-1] = (name, segments[-1][1], stop)
            else:
                segments.append((name, row, stop))
        row = stop
    return tuple(segments)
