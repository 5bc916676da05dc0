"""The adapters an engine knows by name: loaded when needed, the least recently used unloaded when memory is short."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from tunesmith.engine.projection import AdapterTables, rank_of
from tunesmith.errors import InputError
from tunesmith.models.lora import LoraModel
from tunesmith.models.peft_format import load_adapter, remove_adapter


@dataclass(frozen=True, slots=True)
class Registered:
    """An adapter known by name. `key` tells the cache of one from that of another of the same name later."""

    folder: Path
    key: int
    bytes: int
    pinned: bool


class Adapters:
    """Names, folders, and which of them are in memory.

    `tables` is where the fast body keeps adapters; without it they stay in the model's LoRA layers, as what an adapter
    does to the embedding and the head always does. Adapters that the model itself carries (a model in training) are
    known by their names too, and always there.
    """

    def __init__(self, lora: LoraModel, base: str, tables: AdapterTables | None, memory_limit: int) -> None:
        self._lora, self._base, self._tables, self._memory_limit = lora, base, tables, memory_limit
        self._known: dict[str, Registered] = {}
        self._loaded: OrderedDict[str, int] = OrderedDict()  # bytes by name, the least recently used first
        self._numbers = itertools.count()

    @property
    def bytes(self) -> int:
        """What the loaded ones take."""
        return sum(self._loaded.values())

    def add(self, name: str, folder: Path, pinned: bool, busy: Set[str]) -> None:
        """Load an adapter under a new name. Raises InputError."""
        if name in self._known or name in self._carried():
            raise InputError(f'there is already an adapter "{name}"; remove it first or choose another name')
        size = self._load(name, folder)
        self._known[name] = Registered(folder, next(self._numbers), size, pinned)
        self._unload(self.bytes - self._memory_limit, busy | {name})

    def remove(self, name: str) -> None:
        """Take an adapter away. Raises InputError if there is none of that name."""
        self.key(name)
        self._known.pop(name, None)
        self._drop(name)

    def key(self, name: str | None) -> int | str | None:
        """What the cache knows the adapter by. Raises InputError if there is none of that name."""
        if name is None:
            return None
        if name in self._known:
            return self._known[name].key
        if name in self._carried():
            return name
        known = ", ".join(sorted({*self._known, *self._carried()})) or "none"
        raise InputError(f'there is no adapter "{name}" on {self._base}; known: {known}')

    def ready(self, name: str, busy: Set[str]) -> bool:
        """See that an adapter is in memory; False if it must wait for one of the `busy` to be done.

        Raises InputError where it cannot be loaded (any more).
        """
        known = self._known.get(name)
        if known is None or name in self._loaded:
            if known is not None:
                self._loaded.move_to_end(name)
            return True
        over = self.bytes + known.bytes - self._memory_limit
        if self._unload(over, busy) < over and busy:
            return False
        self._load(name, known.folder)
        return True

    def refresh(self) -> None:
        """The weights of adapters that the model carries may have changed."""
        if self._tables is not None:
            for name in self._carried():
                self._tables.put(name, self._lora)

    def clear(self) -> None:
        """Take away all that were added here."""
        for name in list(self._known):
            self.remove(name)

    def _load(self, name: str, folder: Path) -> int:
        load_adapter(self._lora, name, folder)
        rank = rank_of(self._lora, name)
        if self._tables is None:
            size = self._own_bytes(name)
        else:
            self._tables.put(name, self._lora)
            remove_adapter(self._lora, name, inner=True)
            size = self._tables.bytes_for(rank) + self._own_bytes(name)
        self._loaded[name] = size
        return size

    def _own_bytes(self, name: str) -> int:
        """What the model's own layers hold of an adapter."""
        return sum(weights.numel() * weights.element_size() for _, weights in self._lora.parameters(name))

    def _unload(self, wanted: int, busy: Set[str]) -> int:
        """Unload adapters that are neither busy nor pinned until `wanted` bytes are freed; how many were."""
        freed = 0
        for name in list(self._loaded):
            if freed >= wanted:
                break
            if name not in busy and not self._known[name].pinned:
                freed += self._drop(name)
        return freed

    def _drop(self, name: str) -> int:
        if self._tables is not None:
            self._tables.drop(name)
        remove_adapter(self._lora, name)
        return self._loaded.pop(name, 0)

    def _carried(self) -> set[str]:
        """Adapters that someone else put on the model."""
        names = {name for layer in self._lora.everywhere.values() for name in (*layer.adapters, *layer.tokens)}
        return names - self._known.keys()
