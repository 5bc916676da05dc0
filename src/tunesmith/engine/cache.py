"""Keys and values of tokens already computed: a radix tree of shared prefixes, and a slot for each sequence's own end.

    root(adapter) ── "system prompt" ─┬─ "document 1" ── [slot: question, answer so far]
                                      └─ "document 2" ── [slot: question, answer so far]

A node's keys and values are computed once and attended to by every sequence below it. Nodes are made before they are
computed (`filled` says how far they are), so requests that arrive together share too. A sequence's own end lives in a
slot of one big tensor, so that a step of many sequences is one batched attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunesmith.cpu.pages import untouched
from tunesmith.engine.region import Region

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Keys and values of a run of tokens, by layer: [kv_heads, tokens, dim], or [slots, kv_heads, tokens, dim]."""

    keys: list[Tensor]
    values: list[Tensor]
    memory: Tensor | None = None  # the one piece they lie in, where they do

    def copy_from(self, other: KeyValues, source: int, target: int, count: int) -> None:
        """Copy `count` tokens from position `source` of the other to position `target` here."""
        if count:
            into, out_of = slice(target, target + count), slice(source, source + count)
            for mine, theirs in zip(self.keys + self.values, other.keys + other.values, strict=True):
                mine[..., into, :] = theirs[..., out_of, :]


class KvSpec:
    """What the model keeps of a token, layer by layer, and where."""

    def __init__(self, layers: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.dtype, self.device = tuple(layers), dtype, device
        self.numbers_per_token = sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in layers)
        self.bytes_per_token = self.numbers_per_token * dtype.itemsize

    def empty(self, tokens: int, *leading: int) -> KeyValues:
        """Uninitialised room for `tokens` tokens (in each of `leading` slots)."""
        count = math.prod(leading) * tokens * self.numbers_per_token
        return self.within(torch.empty(count, dtype=self.dtype, device=self.device), tokens, *leading)

    def within(self, memory: Tensor, tokens: int, *leading: int) -> KeyValues:
        """The same in memory [leading * tokens * numbers_per_token], whatever is in it."""
        keys = [(*leading, shape.kv_heads, tokens, shape.key_dim) for shape in self.layers]
        values = [(*leading, shape.kv_heads, tokens, shape.value_dim) for shape in self.layers]
        sizes = [math.prod(shape) for shape in (*keys, *values)]
        rooms = [piece.view(shape) for piece, shape in zip(memory.split(sizes), (*keys, *values), strict=True)]
        return KeyValues(rooms[: len(keys)], rooms[len(keys) :], memory)


class Node:
    """A run of tokens that starts at position `start`; the path from the root is the text before it."""

    __slots__ = ("children", "filled", "kv", "parent", "start", "tokens", "used", "users")

    def __init__(self, tokens: Tokens, parent: Node | None, start: int, kv: KeyValues) -> None:
        self.tokens, self.parent, self.start, self.kv = tokens, parent, start, kv
        self.children: dict[int, Node] = {}
        self.filled = 0  # tokens whose keys and values are there
        self.users = 0  # sequences whose path ends here
        self.used = 0  # when last, by the tree's clock

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def whole(self) -> bool:
        return self.filled == len(self.tokens)

    def path(self) -> list[Node]:
        """From the first node below the root to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixTree:
    """Prefixes by adapter. Leaves nobody uses are evicted, the least recently used first, when room is asked for.

    `limit`: about how many bytes of nodes there will be at most; their memory is used again.
    """

    def __init__(self, spec: KvSpec, limit: int) -> None:
        self.spec = spec
        self.region = Region(limit // spec.bytes_per_token * spec.numbers_per_token, spec.dtype, spec.device)
        self.roots: dict[object, Node] = {}
        self.bytes = 0
        self._clock = itertools.count(1)

    def root(self, key: object) -> Node:
        """The empty prefix under an adapter."""
        if key not in self.roots:
            self.roots[key] = Node(np.empty(0, np.int32), None, 0, KeyValues([], []))
        return self.roots[key]

    def extend(self, node: Node, tokens: Tokens) -> Node:
        """The node that ends exactly after `tokens` below `node`; what is missing is made, not yet filled."""
        while len(tokens):
            child = node.children.get(int(tokens[0]))
            if child is None:
                return self._add(node, tokens)
            shared = shared_length(child.tokens, tokens)
            node = child if shared == len(child.tokens) else self._split(child, shared)
            tokens = tokens[shared:]
        return node

    def computed(self, node: Node, tokens: Tokens) -> Iterator[tuple[Node, int]]:
        """Nodes below `node` along `tokens` and how many of their tokens match and are filled, until the first gap."""
        while len(tokens) and (child := node.children.get(int(tokens[0]))) is not None:
            count = min(shared_length(child.tokens, tokens), child.filled)
            if count:
                yield child, count
            if count < len(child.tokens):
                return
            node, tokens = child, tokens[count:]

    def find(self, node: Node, tokens: Tokens) -> Node:
        """The deepest node below `node` that ends within `tokens`, all of it matching."""
        while len(tokens) and (child := node.children.get(int(tokens[0]))) is not None:
            if shared_length(child.tokens, tokens) < len(child.tokens):
                break
            node, tokens = child, tokens[len(child.tokens) :]
        return node

    def use(self, node: Node) -> None:
        """A sequence's path ends here now: neither the node nor what lies above it is evicted."""
        node.users += 1

    def release(self, node: Node) -> None:
        """A sequence is done with its path. What was never filled goes at once."""
        node.users -= 1
        now = next(self._clock)
        for each in node.path():
            each.used = now
        while node.parent is not None and not (node.users or node.children or node.whole):
            parent = node.parent
            self._remove(node)
            node = parent

    def make_room(self, wanted: int) -> int:
        """Evict until `wanted` bytes are freed or nothing is left to evict; how many were."""
        freed = 0
        while freed < wanted:
            leaves = [n for root in self.roots.values() for n in _leaves(root) if n.users == 0 and n.parent is not None]
            if not leaves:
                break
            for node in sorted(leaves, key=lambda n: n.used):
                freed += self._remove(node)
                if freed >= wanted:
                    break
        return freed

    def forget(self, key: object) -> None:
        """Drop everything computed with an adapter. Nobody may be using it."""
        root = self.roots.pop(key, None)
        if root is not None:
            nodes = [node for node in _nodes(root) if node is not root]
            assert not any(node.users for node in nodes)
            for node in nodes:
                self.bytes -= len(node.tokens) * self.spec.bytes_per_token
                self._give_back(node.kv)

    def _add(self, parent: Node, tokens: Tokens) -> Node:
        node = Node(tokens.copy(), parent, parent.end, self._room(len(tokens)))
        node.used = next(self._clock)
        parent.children[int(tokens[0])] = node
        self.bytes += len(tokens) * self.spec.bytes_per_token
        return node

    def _split(self, lower: Node, at: int) -> Node:
        """Cut a node in two; the lower half keeps its identity, since sequences may end there. Returns the upper."""
        assert lower.parent is not None
        assert 0 < at < len(lower.tokens)
        upper = Node(lower.tokens[:at], lower.parent, lower.start, self._room(at))
        upper.kv.copy_from(lower.kv, 0, 0, min(lower.filled, at))
        rest = self._room(len(lower.tokens) - at)
        rest.copy_from(lower.kv, at, 0, max(0, lower.filled - at))
        self._give_back(lower.kv)
        upper.filled, upper.used = min(lower.filled, at), lower.used
        upper.children = {int(lower.tokens[at]): lower}
        lower.parent.children[int(lower.tokens[0])] = upper
        lower.tokens, lower.kv, lower.parent = lower.tokens[at:], rest, upper
        lower.start, lower.filled = lower.start + at, max(0, lower.filled - at)
        return upper

    def _remove(self, node: Node) -> int:
        assert node.parent is not None
        assert not node.children
        assert not node.users
        del node.parent.children[int(node.tokens[0])]
        size = len(node.tokens) * self.spec.bytes_per_token
        self.bytes -= size
        self._give_back(node.kv)
        return size

    def _room(self, tokens: int) -> KeyValues:
        return self.spec.within(self.region.take(tokens * self.spec.numbers_per_token), tokens)

    def _give_back(self, kv: KeyValues) -> None:
        assert kv.memory is not None
        self.region.give_back(kv.memory)


class Slots:
    """Each running sequence's own keys and values, [slots, kv_heads, room, dim] by layer; grows by doubling."""

    def __init__(self, spec: KvSpec) -> None:
        self.spec = spec
        self.count = self.room = 0  # slots; tokens in each
        self.kv = spec.empty(0, 0)

    @property
    def bytes(self) -> int:
        return self.bytes_for(self.count, self.room)

    def bytes_for(self, count: int, room: int) -> int:
        """What that many slots of that many tokens take."""
        return count * room * self.spec.bytes_per_token

    def resize(self, count: int, room: int) -> None:
        """Make room for `count` slots of `room` tokens, keeping what both sizes hold."""
        slots, tokens = min(count, self.count), min(room, self.room)
        for tensors in (self.kv.keys, self.kv.values):
            for layer, before in enumerate(tensors):
                fresh = _zeros(before, count, before.shape[1], room, before.shape[3])
                fresh[:slots, :, :tokens] = before[:slots, :, :tokens]
                tensors[layer] = fresh  # one layer at a time: the old one is freed before the next is made
        self.count, self.room = count, room

    def slot(self, index: int) -> KeyValues:
        """One slot's keys and values, views."""
        return KeyValues([t[index] for t in self.kv.keys], [t[index] for t in self.kv.values])


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros, because masked keys must still be numbers. torch would write to all of them on a CPU, and room that nobody
    uses take time and memory."""
    if like.device.type != "cpu" or not math.prod(shape):
        return like.new_zeros(shape)
    return untouched(math.prod(shape), like.dtype)[1].view(shape)


def shared_length(a: Tokens, b: Tokens) -> int:
    """How many leading tokens are the same."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size


def _nodes(root: Node) -> Iterator[Node]:
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def _leaves(root: Node) -> Iterator[Node]:
    return (node for node in _nodes(root) if not node.children)
