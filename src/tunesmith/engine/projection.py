"""Linears with packed weights and any mix of adapters over them, for the engine's fast body.

A step's rows use adapters in two ways. Runs of prompt tokens have many rows on one adapter: two thin products. Decoding
rows have one row each on many adapters, where one product an adapter would be nearly all overhead:

    low[j]  = A[j] x[j]                  one matrix-vector product an adapter, for all linears that share the input
    y[j]   += sum_r low[j, r] B[j][r]    for all rows at once, ranks of any size: a weighted sum of rows of a table of
                                         all adapters' B (transposed), which is what embedding_bag computes

DoRA is y = g (W x + s B A x) + bias: its B is put into the tables with g in it, and W x is multiplied beforehand.

Where one adapter has been alone for a while, W + s B A is packed as well, and steps that are wholly its own use that:
exact to rounding, and nothing is left to do for the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.dora import gain
from tunesmith.models.fused_layer import Workspace
from tunesmith.models.lora import LoraLinear, LoraModel
from tunesmith.models.packed import PackedLinear
from tunesmith.models.quantised import QuantisedLinear, stack_matrices

Segment = tuple[str, int, int]  # adapter, first row, one past the last
FIRST_ROOM = 32  # ranks


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter lies in every table: rows [start, start + rank)."""

    start: int
    rank: int


@dataclass
class Mix:
    """Which rows of a step use which adapter. `runs` have many rows each, `singles` one each, from row 0 on.

    A single without adapter has a place of rank 0.
    """

    runs: tuple[tuple[str, Place, int, int], ...]
    singles: tuple[tuple[str | None, Place], ...]
    table_rows: Tensor  # the singles' table rows, one after the other
    bags: Tensor  # [singles] where each single's begin
    whole: str | None = None  # the adapter that every row uses, where it is one
    _picks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, segments: Sequence[Segment], singles: int, places: dict[str, Place], whole: str | None = None) -> Mix:
        """`singles`: how many leading rows are to be taken one by one."""
        own: list[tuple[str | None, Place]] = [(None, Place(0, 0))] * singles
        runs = []
        for name, start, stop in segments:
            if name not in places:
                continue
            for row in range(start, min(stop, singles)):
                own[row] = (name, places[name])
            if stop > singles:
                runs.append((name, places[name], max(start, singles), stop))
        rows = [place.start + r for _, place in own for r in range(place.rank)]
        starts = torch.tensor([0, *(place.rank for _, place in own)]).cumsum(0)[:-1]
        return cls(tuple(runs), tuple(own), torch.tensor(rows, dtype=torch.long), starts, whole)

    def picks(self, linears: int, index: int) -> Tensor:
        """Where linear `index` of `linears` finds its part of the singles' thin products, which lie adapter by adapter.

        Worked example: 2 linears, ranks 1 and 2 give [a0 a1 | b0 b0 b1 b1]; linear 1 picks 1, 4, 5.
        """
        if (linears, index) not in self._picks:
            starts = [linears * start for start in self.bags.tolist()]
            ranks = [place.rank for _, place in self.singles]
            picked = [s + index * rank + r for s, rank in zip(starts, ranks, strict=True) for r in range(rank)]
            self._picks[linears, index] = torch.tensor(picked, dtype=torch.long)
        return self._picks[linears, index]


class DequantisedLinear:
    """y = x W^T + b over quantised linears that share their input, dequantised at every call: slower than packed
    numbers where rows are few, but nothing more is held than one W."""

    def __init__(self, linears: Sequence[QuantisedLinear], scratch: Workspace) -> None:
        self._linears, self._scratch = linears, scratch
        self._out, self._in = sum(linear.out_features for linear in linears), linears[0].in_features
        biases: list[tuple[Tensor | None, int]] = [(each.bias, each.out_features) for each in linears]
        self.bias = None
        if any(bias is not None for bias, _ in biases):
            self.bias = torch.cat([torch.zeros(width) if bias is None else bias.detach() for bias, width in biases])

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], new."""
        weight = stack_matrices(self._linears, self._scratch.take("weight", self._out, self._in))
        return torch.mm(x, weight.t()) if self.bias is None else torch.addmm(self.bias, x, weight.t())


class Projection:
    """Linears over one input, and the adapters on each: [rows, in] -> [rows, sum of out]."""

    def __init__(self, *linears: Any, scratch: Workspace) -> None:
        """`scratch` is where quantised weights are dequantised at every call."""
        bases: list[Any] = [each.base if isinstance(each, LoraLinear) else each for each in linears]
        self._biases = [base.bias for base in bases]
        quantised = [base for base in bases if isinstance(base, QuantisedLinear)]
        self.quantised = bool(quantised)
        if quantised:
            self._packed: PackedLinear | DequantisedLinear = DequantisedLinear(quantised, scratch)
        else:
            self._packed = PackedLinear([base.weight for base in bases], self._biases)
        self._merged: tuple[str, PackedLinear | DequantisedLinear] | None = None  # with one adapter in the weights
        self._linears: tuple[Any, ...] = linears
        widths = [base.out_features for base in bases]
        starts = torch.tensor([0, *widths]).cumsum(0).tolist()
        self._columns = [slice(start, start + width) for start, width in zip(starts, widths, strict=False)]
        self._tables = [torch.zeros(0, width) for width in widths]  # [room, out]: rows of B^T of all adapters
        self._downs: dict[str, Tensor] = {}  # scaling * A of all linears, [linears * rank, in]
        self._gains: dict[str, Tensor] = {}  # g - 1 of an adapter with DoRA, [sum of out]; zero where it has none

    @property
    def numbers_per_rank(self) -> int:
        """How many numbers an adapter of rank 1 has here."""
        return sum(linear.in_features + linear.out_features for linear in self._linears)

    def make_room(self, rows: int) -> None:
        """Tables of `rows` rows at least."""
        self._tables = [
            torch.cat((table, table.new_zeros(rows - len(table), table.shape[1]))) for table in self._tables
        ]

    def put(self, name: str, place: Place) -> None:
        """Take an adapter over from the linears. Smaller ranks are filled up with zeros."""
        found = [each.adapters.get(name) if isinstance(each, LoraLinear) else None for each in self._linears]
        down = torch.zeros(len(found), place.rank, self._linears[0].in_features)
        more = torch.zeros(self._columns[-1].stop)
        for index, weights in enumerate(found):
            table = self._tables[index][place.start : place.start + place.rank]
            table.zero_()
            if weights is not None:
                rank = weights.a.shape[0]
                torch.mul(weights.a.detach(), weights.scaling, out=down[index, :rank])
                table[:rank] = weights.b.detach().t()
                if weights.magnitude is not None:
                    g = gain(self._linears[index].dense(), weights).detach()
                    table[:rank] *= g
                    more[self._columns[index]] = g - 1
        self.drop(name)
        if any(weights is not None for weights in found):
            self._downs[name] = down.flatten(0, 1)
        if any(weights is not None and weights.magnitude is not None for weights in found):
            self._gains[name] = more

    def drop(self, name: str) -> None:
        self._downs.pop(name, None)
        self._gains.pop(name, None)

    @property
    def bytes(self) -> int:
        """What its weights take."""
        return 4 * sum(linear.in_features * linear.out_features for linear in self._linears)

    def merge(self, name: str, place: Place) -> None:
        """Pack W + s B A (DoRA: g times that) of an adapter as well."""
        down = self._downs.get(name)
        if down is None:
            self._merged = (name, self._packed)
            return
        weights, more = [], self._gains.get(name)
        parts = zip(self._linears, self._tables, down.split(place.rank), self._columns, strict=True)
        for linear, table, a, columns in parts:
            base = linear.base.weight if isinstance(linear, LoraLinear) else linear.weight
            if more is not None:
                base = base * (1 + more[columns])[:, None]
            weights.append(torch.addmm(base, table[place.start : place.start + place.rank].t(), a))
        self._merged = (name, PackedLinear(weights, self._biases))

    def unmerge(self) -> None:
        self._merged = None

    def __call__(self, x: Tensor, mix: Mix) -> Tensor:
        if self._merged is not None and self._merged[0] == mix.whole:
            return self._merged[1](x)
        y = self._packed(x)
        if self._gains:
            self._multiply(y, mix)
        for name, place, start, stop in mix.runs:
            down = self._downs.get(name)
            if down is not None:
                low = torch.mm(x[start:stop], down.t())
                for index, columns in enumerate(self._columns):
                    own = low[:, index * place.rank : (index + 1) * place.rank]
                    y[start:stop, columns].addmm_(own, self._tables[index][place.start : place.start + place.rank])
        if len(mix.table_rows):
            self._add_singles(x, y, mix)
        return y

    def _multiply(self, y: Tensor, mix: Mix) -> None:
        """y = g W x + bias, from W x + bias, for the rows of adapters with DoRA."""
        bias = self._packed.bias
        for name, _, start, stop in mix.runs:
            more = self._gains.get(name)
            if more is not None:
                part = y[start:stop]
                part.addcmul_(part if bias is None else part - bias, more)
        found = [(row, None if name is None else self._gains.get(name)) for row, (name, _) in enumerate(mix.singles)]
        gains = {row: more for row, more in found if more is not None}
        if gains:
            rows = torch.tensor(list(gains))
            part = y[rows]
            plain = part if bias is None else part - bias
            y[rows] = torch.addcmul(part, plain, torch.stack(list(gains.values())))

    def _add_singles(self, x: Tensor, y: Tensor, mix: Mix) -> None:
        count = len(self._columns)
        low = torch.zeros(count * len(mix.table_rows))
        pieces = low.split([count * place.rank for _, place in mix.singles])
        for (name, _), row, piece in zip(mix.singles, x.unbind(0), pieces, strict=False):
            down = None if name is None else self._downs.get(name)
            if down is not None:
                torch.mv(down, row, out=piece)
        for index, columns in enumerate(self._columns):
            weights = low if count == 1 else low.index_select(0, mix.picks(count, index))
            added = torch.embedding_bag(self._tables[index], mix.table_rows, mix.bags, False, 0, False, weights)
            y[: len(mix.singles), columns] += added[0]


class AdapterTables:
    """Gives adapters their place in all projections' tables."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        self._projections = projections
        self.places: dict[str, Place] = {}
        self.merged: str | None = None  # the adapter that the projections have in their weights as well
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
            place = Place(self._free(rank), rank)
        for projection in self._projections:
            projection.put(name, place)
        self.places[name] = place

    def drop(self, name: str) -> None:
        """Forget an adapter; its place is given to the next that fits."""
        self._unmerge(name)
        if self.places.pop(name, None) is not None:
            for projection in self._projections:
                projection.drop(name)

    @property
    def merged_bytes(self) -> int:
        """What the weights of one adapter with the base take."""
        return sum(projection.bytes for projection in self._projections)

    def merge(self, name: str) -> None:
        """Keep the weights of the base with this adapter in them, and no other's."""
        for projection in self._projections:
            projection.unmerge()  # its memory is the next one's
            projection.merge(name, self.places[name])
        self.merged = name

    def _unmerge(self, name: str) -> None:
        if self.merged == name:
            self.merged = None
            for projection in self._projections:
                projection.unmerge()

    def _free(self, rank: int) -> int:
        """The first gap of `rank` rows; the tables grow where there is none."""
        end = 0
        for place in sorted(self.places.values(), key=lambda p: p.start):
            if place.start - end >= rank:
                return end
            end = max(end, place.start + place.rank)  # one of rank 0 lies anywhere
        if end + rank > self._room:
            self._room = max(FIRST_ROOM, self._room * 3 // 2, end + rank)
            for projection in self._projections:
                projection.make_room(self._room)
        return end


def rank_of(lora: LoraModel, name: str) -> int:
    """An adapter's largest rank in the inner linears."""
    ranks = (layer.adapters[name].a.shape[0] for layer in lora.layers.values() if name in layer.adapters)
    return max(ranks, default=0)
