"""Which sequences run, and which of their tokens go through the model in the next step.

Sequences join and leave between steps. A step holds one token of every decoding sequence and, up to a budget, runs of
prompt tokens of the others. Before a sequence joins it is compared with those running and waiting: what it shares with
them goes into the prefix tree and is computed once, the rest into a slot of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace

from tunesmith.engine.cache import KvSpec, Node, PrefixTree, Slots, Tokens, shared_length
from tunesmith.engine.generation import Generation
from tunesmith.engine.queue import Queue
from tunesmith.engine.speculation import Speculation
from tunesmith.errors import InputError

MIN_SHARED = 16  # tokens: a shorter shared prefix is computed again rather than attended to apart
LOOKAHEAD = 128  # waiting sequences that a new one is compared with
LONGEST_TAIL = 1024  # tokens in a slot; a longer end is moved into a node
ROOM_STEP = 64  # slots grow by this many tokens
GROWTH = 1.5  # of the slots, where there is memory for it: every time all of them are copied


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, stop) of a sequence in this step; `node` is where they go, None for the slot.

    `guesses` come after them, one row each, and count only where the model turns out to say the same.
    """

    generation: Generation
    start: int
    stop: int
    node: Node | None = None
    guesses: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.stop - self.start + len(self.guesses)

    @property
    def tokens(self) -> list[int]:
        return [*self.generation.slice(self.start, self.stop), *self.guesses]

    def seen_nodes(self) -> list[Node]:
        """The nodes that hold what lies before the place these tokens are written to."""
        holder = self.node.parent if self.node is not None else self.generation.node
        return [] if holder is None else holder.path()


@dataclass(slots=True)
class Plan:
    """One step: `decode` has one token each (and guesses) and comes first in the flat sequence, then `prefill`."""

    decode: list[Chunk] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        """In the order of the step's rows."""
        return self.decode + self.prefill


class Scheduler:
    """Owns the queue, the running sequences and the cache they share."""

    def __init__(
        self,
        spec: KvSpec,
        *,
        memory_limit: int,
        max_batch: int,
        step_tokens: int,
        ready: Callable[[str, Set[str]], bool],
    ) -> None:
        """`ready(adapter, busy)` sees that an adapter is in memory; False if it must wait for one of the `busy`."""
        self._ready = ready
        self.tree, self.slots = PrefixTree(spec, memory_limit), Slots(spec)
        self.memory_limit, self.max_batch, self.step_tokens = memory_limit, max_batch, step_tokens
        self.speculation = Speculation()
        self.waiting = Queue()
        self.running: list[Generation] = []

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    def plan(self) -> Plan:
        """Let sequences join while there is room, and choose the tokens of the next step."""
        self._join()
        self._give_room()
        plan = Plan()
        filling: dict[Node, int] = {}
        backlog: list[Generation] = []
        for generation in self.running:
            done = self._computed(generation)
            if done is not None and generation.length - done == 1:
                plan.decode.append(Chunk(generation, done, done + 1))
            else:
                backlog.append(generation)
        plan.decode = [self._with_guesses(chunk, len(plan.decode)) for chunk in plan.decode]
        budget = max(self.step_tokens - sum(chunk.rows for chunk in plan.decode), MIN_SHARED)
        for generation in backlog:
            while budget > 0 and (chunk := self._next_chunk(generation, filling, budget, plan)) is not None:
                plan.prefill.append(chunk)
                budget -= chunk.stop - chunk.start
        by_adapter = {name: i for i, name in enumerate(dict.fromkeys(g.cache_key for g in self.running))}
        plan.decode.sort(key=lambda c: (by_adapter[c.generation.cache_key], c.generation.slot))
        plan.prefill.sort(key=lambda c: by_adapter[c.generation.cache_key])
        return plan

    def advance(self, plan: Plan) -> None:
        """The step was computed: its tokens are in the cache now."""
        for chunk in plan.chunks:
            count = chunk.stop - chunk.start
            chunk.generation.computed += count
            if chunk.node is None:
                chunk.generation.tail += count
            else:
                chunk.node.filled += count

    def leave(self, generation: Generation) -> None:
        """A running or waiting sequence is over; what it computed stays in the tree while there is room."""
        if generation.node is None:
            self.waiting.remove(generation)
            return
        if generation.gap() is None:
            self._keep_tail(generation)
        self._vacate(generation)

    def clear(self) -> None:
        """Empty the cache, whose memory is kept for what comes; nothing may be running."""
        assert self.idle
        for key in list(self.tree.roots):
            self.tree.forget(key)
        self.speculation.forget()

    def free(self) -> None:
        """Give the memory of the cache back, and with it all that is in it; nothing may be running."""
        assert self.idle
        self.tree, self.slots = PrefixTree(self.tree.spec, self.memory_limit), Slots(self.tree.spec)

    def _with_guesses(self, chunk: Chunk, sequences: int) -> Chunk:
        """A decoding sequence's next row, and those of what is likely to follow."""
        room = self.slots.room - chunk.generation.tail - 1
        return replace(chunk, guesses=chunk.generation.guess(self.speculation, sequences, room))

    def _join(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            head = self.waiting.head
            try:
                if not self._admit(head):
                    return
            except InputError as error:  # the one request that can never fit; the others go on
                head.error, head.finish_reason = error, "cancelled"
            self.waiting.pop_head()

    def _computed(self, generation: Generation) -> int | None:
        """Tokens in the cache, None while a node of the path is not whole."""
        assert generation.node is not None
        return None if generation.gap() is not None else generation.node.end + generation.tail

    def _next_chunk(self, generation: Generation, filling: dict[Node, int], budget: int, plan: Plan) -> Chunk | None:
        """The next run of tokens of a sequence that this step can take; None if it must wait for another's."""
        assert generation.node is not None
        for node in generation.node.path():
            filled = filling.get(node, node.filled)
            if filled == len(node.tokens):
                continue
            if node in filling:  # another sequence computes a part of it in this step, and the rest later
                return None
            count = min(len(node.tokens) - filled, budget)
            filling[node] = filled + count
            return Chunk(generation, node.start + filled, node.start + filled + count, node)
        planned = sum(c.stop - c.start for c in plan.prefill if c.generation is generation and c.node is None)
        start = generation.node.end + generation.tail + planned
        stop = min(generation.length, start + budget)
        return Chunk(generation, start, stop) if stop > start else None

    def _admit(self, generation: Generation) -> bool:
        """Place a waiting sequence; False if memory lacks and it must wait for others to leave."""
        busy = {g.adapter for g in self.running if g.adapter is not None}
        if generation.adapter is not None and not self._ready(generation.adapter, busy):
            return False
        tokens = generation.tokens
        root = self.tree.root(generation.cache_key)
        cut = self._shared(generation)
        end = generation.reusable
        expected = len(tokens) - cut + min(generation.max_tokens - len(generation.generated), 4 * ROOM_STEP)
        if expected > LONGEST_TAIL:
            cut = max(cut, min(len(tokens) - 1, end))
            expected = len(tokens) - cut
        known = self.tree.find(root, tokens[:cut])
        self.tree.use(known)  # making room must not evict it
        if not self._fits(expected, cut - known.end):
            self.tree.release(known)
            return False
        node = self.tree.extend(known, tokens[known.end : cut])
        self.tree.use(node)
        self.tree.release(known)
        generation.node, generation.slot, generation.tail = node, len(self.running), 0
        self.running.append(generation)
        if generation.gap() is None:
            generation.tail = self._copy_tail(generation, tokens[cut:end] if end > cut else tokens[:0])
        return True

    def _shared(self, generation: Generation) -> int:
        """Where to cut a sequence into the part that goes into the tree and its own end.

        The cut that saves most, length times the number of other sequences that share it; from there again, with those
        that share more. Worked example: 11 others share 30 tokens, 3 of them 78: first 30 (11 x 30 > 3 x 78), then 78
        (3 x 48 more). Those that share less split the node later.
        """
        tokens, limit = generation.tokens, generation.reusable
        others = [g for g in self.running if g.cache_key == generation.cache_key]
        for i, other in enumerate(self.waiting):
            if i > LOOKAHEAD:
                break
            if other is not generation and other.cache_key == generation.cache_key:
                others.append(other)
        lengths = sorted((min(shared_length(tokens, o.tokens), limit) for o in others), reverse=True)
        best = 0
        while gains := [
            ((length - best) * i, length) for i, length in enumerate(lengths, 1) if length - best >= MIN_SHARED
        ]:
            best = max(gains)[1]
        boundary = self.tree.find(self.tree.root(generation.cache_key), tokens[:best]).end
        if best - boundary < MIN_SHARED:
            best = boundary
        return best if best >= MIN_SHARED else 0

    def _copy_tail(self, generation: Generation, tokens: Tokens) -> int:
        """Copy what the tree has of a sequence's own end into its slot; how many tokens that is."""
        assert generation.node is not None
        done, slot = 0, self.slots.slot(generation.slot)
        for node, count in self.tree.computed(generation.node, tokens):
            count = min(count, self.slots.room - done)
            slot.copy_from(node.kv, 0, done, count)
            done += count
        return done

    def _fits(self, tail: int, fresh: int) -> bool:
        """Make room for one more slot of `tail` tokens and `fresh` new tokens in the tree."""
        count, room = len(self.running) + 1, max(self.slots.room, _rounded(tail))
        if count > self.slots.count:
            count = min(self.max_batch, count + len(self.waiting))
        for slots in dict.fromkeys((max(count, self.slots.count), max(len(self.running) + 1, self.slots.count))):
            if self._reserve_to_grow(slots, room, fresh):
                return True
        if self.running:
            return False
        if not self._reserve(1, _rounded(tail), fresh):
            raise InputError(
                f"a prompt needs more memory for its keys and values than the engine may take "
                f"({self.memory_limit >> 20} MB); raise memory_limit or shorten it"
            )
        return True

    def _reserve_to_grow(self, slots: int, room: int, fresh: int) -> bool:
        """The same as `_reserve`, with more room where slots must grow and nothing need be evicted for it."""
        if room > self.slots.room:
            ample = max(room, _rounded(self.slots.room * GROWTH))
            room = ample if self._over(slots, ample, fresh) <= 0 else room
        return self._reserve(slots, room, fresh)

    def _over(self, slots: int, room: int, fresh: int) -> int:
        """Bytes beyond the memory limit that would be held then; negative where some are left."""
        wanted = self.slots.bytes_for(slots, room) + self.tree.bytes + fresh * self.tree.spec.bytes_per_token
        return wanted - self.memory_limit

    def _reserve(self, slots: int, room: int, fresh: int) -> bool:
        """Resize the slots if memory allows, after evicting from the tree what nobody uses."""
        over = self._over(slots, room, fresh)
        if over > 0 and self.tree.make_room(over) < over:
            return False
        if (slots, room) != (self.slots.count, self.slots.room):
            self.slots.resize(slots, room)
            self.tree.region.trim()  # what the tree has had and slots have now
        return True

    def _give_room(self) -> None:
        """Before a step: every slot takes one more token at least. Long tails move into nodes; the newest may yield."""
        for generation in list(self.running):
            if generation.tail >= LONGEST_TAIL:
                self._spill(generation)
        while self.running:
            needed = max(self._tail_wanted(g) for g in self.running)
            if needed <= self.slots.room or self._reserve_to_grow(self.slots.count, _rounded(needed), 0):
                return
            newest = self.running[-1]
            if len(self.running) == 1:  # nobody left to wait for
                limit = f"{self.memory_limit >> 20} MB"
                newest.error = InputError(f"an answer outgrew the engine's memory_limit ({limit}); raise it")
                newest.finish_reason = "cancelled"
                self._vacate(newest)
                return
            self._preempt(newest)

    def _tail_wanted(self, generation: Generation) -> int:
        assert generation.node is not None
        return generation.length - generation.node.end

    def _preempt(self, generation: Generation) -> None:
        """Back to the head of the queue; its tokens are kept and computed again later."""
        self._vacate(generation)
        generation.node, generation.slot, generation.tail = None, -1, 0
        generation.scores.clear()
        self.waiting.give_back(generation)

    def _spill(self, generation: Generation) -> None:
        """Move a long tail into the tree."""
        node = self._keep_tail(generation)
        if node is not None:
            self.tree.use(node)
            assert generation.node is not None
            self.tree.release(generation.node)
            generation.node, generation.tail = node, 0

    def _keep_tail(self, generation: Generation) -> Node | None:
        """Copy a tail into the tree; the node that ends there, or None if memory lacks."""
        assert generation.node is not None
        size = generation.tail * self.tree.spec.bytes_per_token
        over = self.slots.bytes + self.tree.bytes + size - self.memory_limit
        if over > 0 and self.tree.make_room(over) < over:
            return None
        start = generation.node.end
        end = self.tree.extend(generation.node, generation.tokens[start : start + generation.tail])
        slot = self.slots.slot(generation.slot)
        for node in end.path():
            if node.start >= start and not node.whole:
                node.kv.copy_from(slot, node.start - start, 0, len(node.tokens))
                node.filled = len(node.tokens)
        return end

    def _vacate(self, generation: Generation) -> None:
        """Free its slot; the last slot's sequence moves there, so that used slots lie together."""
        assert generation.node is not None
        self.running.remove(generation)
        self.tree.release(generation.node)
        hole, last = generation.slot, len(self.running)
        if hole != last:
            mover = next(g for g in self.running if g.slot == last)
            self.slots.slot(hole).copy_from(self.slots.slot(last), 0, 0, mover.tail)
            mover.slot = hole


def _rounded(tokens: float) -> int:
    return -(-(int(tokens) + 1) // ROOM_STEP) * ROOM_STEP
