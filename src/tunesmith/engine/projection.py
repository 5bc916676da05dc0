"""Linears with packed weights and any mix of adapters over them, for the engine's fast body.

All adapters' A and B lie row by row in one table each. One call does it for all adapters of a step, where one each
would be nearly all overhead: decoding sequences have a row or a few guessed ones each, runs of prompt tokens many
(cpu/blocks.py).

DoRA is y = g (W x + s B A x) + bias: its B is put into the tables with g in it, and W x is multiplied beforehand.

Where one adapter has been alone for a while, W + s B A is packed as well, and steps that are wholly its own use that:
exact to rounding, and nothing is left to do for the adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.cpu import blocks
from tunesmith.engine.packing import Packing, Product
from tunesmith.models.dora import gain
from tunesmith.models.lora import LoraLinear, LoraModel
from tunesmith.models.packed import PackedLinear

Segment = tuple[str, int, int]  # adapter, first row, one past the last


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter lies in every table: one row a rank, ascending."""

    rows: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.rows)

    @property
    def whole(self) -> bool:
        """Whether its rows lie together."""
        return not self.rows or self.rows[-1] - self.rows[0] + 1 == self.rank

    def of(self, table: Tensor) -> Tensor:
        """Its rows of a table, a view where they lie together."""
        if self.whole:
            first = self.rows[0] if self.rows else 0
            return table[first : first + self.rank]
        return table.index_select(0, torch.tensor(self.rows))

    def write(self, table: Tensor, numbers: Tensor | None, factor: float | Tensor = 1.0) -> None:
        """Put factor * numbers into its rows of a table, and zeros where there are fewer of them."""
        own = self.of(table)
        count = 0 if numbers is None else len(numbers)
        if numbers is not None:
            torch.mul(numbers, factor, out=own[:count])
        own[count:] = 0.0
        if not self.whole:
            table.index_copy_(0, torch.tensor(self.rows), own)


@dataclass
class Mix:
    """Which rows of a step use which adapter: its name and place, the first row and one past the last."""

    runs: tuple[tuple[str, Place, int, int], ...]
    whole: str | None = None  # the adapter that every row uses, where it is one

    def __post_init__(self) -> None:
        self.names = frozenset(name for name, *_ in self.runs)
        self.blocks = blocks.Blocks([(place.rows, start, stop) for _, place, start, stop in self.runs])

    @classmethod
    def of(cls, segments: Sequence[Segment], places: dict[str, Place], whole: str | None = None) -> Mix:
        return cls(tuple((name, places[name], a, b) for name, a, b in segments if name in places), whole)


class Projection:
    """Linears over one input, and the adapters on each: [rows, in] -> [rows, sum of out]."""

    def __init__(self, *linears: Any, packing: Packing) -> None:
        bases: list[Any] = [each.base if isinstance(each, LoraLinear) else each for each in linears]
        self._biases = [base.bias for base in bases]
        self._packed = packing(bases)
        self._merged: tuple[str, Product] | None = None  # with one adapter in the weights
        self._linears: tuple[Any, ...] = linears
        widths = [base.out_features for base in bases]
        starts = torch.tensor([0, *widths]).cumsum(0).tolist()
        self._columns = [slice(start, start + width) for start, width in zip(starts, widths, strict=False)]
        self._ends = torch.tensor(starts[1:])
        self._downs = torch.empty(
            0, len(linears), int(linears[0].in_features)
        )  # [room, linears, in]: rows of scaling * A
        self._ups = torch.empty(0, starts[-1])  # [room, sum of out]: rows of B^T
        self._names: set[str | None] = set()  # adapters that are not zero here
        self._gains: dict[str | None, Tensor] = {}  # g - 1 of those with DoRA, [sum of out]; zero where it has none

    @property
    def numbers_per_rank(self) -> int:
        """How many numbers an adapter of rank 1 has here."""
        return sum(linear.in_features + linear.out_features for linear in self._linears)

    def make_room(self, rows: int) -> None:
        """Tables of `rows` rows. What is not written is not touched, so it takes no memory."""
        self._downs = _longer(self._downs, rows)
        self._ups = _longer(self._ups, rows)

    def put(self, name: str, place: Place) -> None:
        """Take an adapter over from the linears. Smaller ranks are filled up with zeros."""
        found = [each.adapters.get(name) if isinstance(each, LoraLinear) else None for each in self._linears]
        self.drop(name)
        if any(weights is not None for weights in found):
            self._names.add(name)
        more = torch.zeros(self._columns[-1].stop)
        for index, weights in enumerate(found):
            if weights is None:  # beside others its rows are read
                place.write(self._downs[:, index], None)
                place.write(self._ups[:, self._columns[index]], None)
                continue
            g: float | Tensor = 1.0
            if weights.magnitude is not None:
                g = gain(self._linears[index].dense(), weights).detach()
                more[self._columns[index]] = g - 1
                self._gains[name] = more
            place.write(self._downs[:, index], weights.a.detach(), weights.scaling)
            place.write(self._ups[:, self._columns[index]], weights.b.detach().t(), g)

    def drop(self, name: str) -> None:
        self._names.discard(name)
        self._gains.pop(name, None)

    @property
    def bytes(self) -> int:
        """What its weights take."""
        return 4 * sum(linear.in_features * linear.out_features for linear in self._linears)

    def merge(self, name: str, place: Place) -> None:
        """Pack W + s B A (DoRA: g times that) of an adapter as well."""
        if name not in self._names:
            self._merged = (name, self._packed)
            return
        weights, more = [], self._gains.get(name)
        ups = place.of(self._ups)
        for linear, down, columns in zip(self._linears, place.of(self._downs).unbind(1), self._columns, strict=True):
            base = linear.base.weight if isinstance(linear, LoraLinear) else linear.weight
            if more is not None:
                base = base * (1 + more[columns])[:, None]
            weights.append(torch.addmm(base, ups[:, columns].t(), down))
        self._merged = (name, PackedLinear.of(weights, self._biases))

    def unmerge(self) -> None:
        self._merged = None

    def way(self, mix: Mix) -> tuple[bool, bool]:
        """The same for projections that call the same kernels: whether some adapter of the mix is to be added, and
        whether some adapter has DoRA."""
        return not self._names.isdisjoint(mix.names), bool(self._gains)

    def memory(self, mix: Mix) -> list[Tensor]:
        """What of its own it reads then."""
        return [*self._product(mix).memory, self._downs, self._ups, self._ends]

    def _product(self, mix: Mix) -> Product:
        """Of the base's weights, or of those with an adapter in them where that is the only one."""
        return self._packed if self._merged is None or self._merged[0] != mix.whole else self._merged[1]

    def __call__(self, x: Tensor, mix: Mix, onto: Tensor | None = None) -> Tensor:
        """[rows, in] -> [rows, sum of out], new, or added to `onto`."""
        product = self._product(mix)
        if product is not self._packed:
            return product(x, onto)
        adds, multiplies = self.way(mix)
        if multiplies and onto is not None:  # which DoRA does not multiply
            return onto.add_(self(x, mix))
        y = self._packed(x, onto)
        if multiplies:
            self._multiply(y, mix)
        if adds:
            blocks.add(self._downs, self._ups, self._ends, mix.blocks, x, y)
        return y

    def _multiply(self, y: Tensor, mix: Mix) -> None:
        """y = g W x + bias, from W x + bias, for the rows of adapters with DoRA."""
        bias = self._packed.bias
        for name, _, start, stop in mix.runs:
            more = self._gains.get(name)
            if more is not None:
                part = y[start:stop]
                part.addcmul_(part if bias is None else part - bias, more)


def _longer(table: Tensor, rows: int) -> Tensor:
    longer = table.new_empty(rows, *table.shape[1:])
    longer[: len(table)] = table
    return longer


class AdapterTables:
    """Gives adapters their place in all projections' tables, which have room for `limit` bytes of them."""

    def __init__(self, projections: Sequence[Projection], limit: int) -> None:
        self._projections = projections
        self.places: dict[str, Place] = {}
        self.merged: str | None = None  # the adapter that the projections have in their weights as well
        self.limit = limit
        self.version = 0  # another after every change
        self._room = 0

    def bytes_for(self, rank: int) -> int:
        """What an adapter takes."""
        return 4 * rank * sum(projection.numbers_per_rank for projection in self._projections)

    def put(self, name: str, lora: LoraModel) -> None:
        """Take over (again) the weights that the model's LoRA layers have under a name."""
        self._unmerge(name)
        rank = rank_of(lora, name)
        place = self.places.get(name)
        if place is None or place.rank != rank:
            self.drop(name)
            place = self._free(rank)
        for projection in self._projections:
            projection.put(name, place)
        self.places[name] = place
        self.version += 1

    def drop(self, name: str) -> None:
        """Forget an adapter; its place is given to the next that fits."""
        self._unmerge(name)
        self.version += 1
        if self.places.pop(name, None) is not None:
            for projection in self._projections:
                projection.drop(name)

    def merge(self, name: str) -> None:
        """Keep the weights of the base with this adapter in them, and no other's."""
        for projection in self._projections:
            projection.unmerge()  # its memory is the next one's
            projection.merge(name, self.places[name])
        self.merged = name
        self.version += 1

    def _unmerge(self, name: str) -> None:
        if self.merged == name:
            self.merged = None
            for projection in self._projections:
                projection.unmerge()

    def _free(self, rank: int) -> Place:
        """The first gap of `rank` rows; where there is none, rows of several. Room is made beyond the limit only."""
        taken = sorted(row for place in self.places.values() for row in place.rows)
        wanted = max(len(taken) + rank, self.limit // self.bytes_for(1))
        if self._room < wanted:
            self._room = wanted
            for projection in self._projections:
                projection.make_room(wanted)
        scattered: list[int] = []
        for before, after in itertools.pairwise([-1, *taken, self._room]):
            if after - before > rank:
                return Place(tuple(range(before + 1, before + 1 + rank)))
            scattered += range(before + 1, after)
        return Place(tuple(scattered[:rank]))


def rank_of(lora: LoraModel, name: str) -> int:
    """An adapter's largest rank in the inner linears."""
    ranks = (layer.adapters[name].a.shape[0] for layer in lora.layers.values() if name in layer.adapters)
    return max(ranks, default=0)
