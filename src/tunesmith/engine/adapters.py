"""The adapters an engine knows by name: loaded when needed, the least recently used unloaded when memory is short.

A name costs a path and a look at the file's header, so an engine may know thousands. Weights are read when a request
is about to begin; where they turn out broken, or no longer those that were registered, that request fails alone.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from tunesmith.engine.projection import AdapterTables
from tunesmith.errors import InputError
from tunesmith.models.lora import LoraModel
from tunesmith.models.peft_file import WEIGHTS
from tunesmith.models.peft_format import CONFIG, AdapterSize, check_adapter, load_adapter, remove_adapter

Stamp = tuple[int, ...]  # sizes and times of change of an adapter's files


@dataclass(frozen=True, slots=True)
class Registered:
    """An adapter known by name. `key` tells the cache of one from that of another of the same name later."""

    folder: Path
    key: int
    bytes: int
    pinned: bool
    stamp: Stamp


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
        """Register an adapter under a new name; a pinned one is loaded at once, and stays. Raises InputError."""
        if name in self._known or name in self._carried():
            raise InputError(f'there is already an adapter "{name}"; remove it first or choose another name')
        size = check_adapter(self._lora, folder)
        self._known[name] = Registered(folder, next(self._numbers), self._bytes_for(size), pinned, _stamp(folder))
        if pinned:
            try:
                self._unload(self._known[name].bytes + self.bytes - self._memory_limit, busy)
                self._load(name)
            except InputError:
                del self._known[name]
                raise

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
        self._load(name)
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

    def _bytes_for(self, size: AdapterSize) -> int:
        """What an adapter takes; in the tables every linear has rows for its largest rank."""
        return size.ends + (size.inner if self._tables is None else self._tables.bytes_for(size.rank))

    def _load(self, name: str) -> None:
        known = self._known[name]
        if _stamp(known.folder) != known.stamp:
            # What was computed with the old one is still in the cache, and whoever registered it may have proved it.
            raise InputError(f'adapter "{name}" was changed since it was registered; add it again', file=known.folder)
        load_adapter(self._lora, name, known.folder)
        if self._tables is not None:
            self._tables.put(name, self._lora)
            remove_adapter(self._lora, name, inner=True)
        self._loaded[name] = known.bytes

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


def _stamp(folder: Path) -> Stamp:
    """Raises InputError where the adapter's files are gone."""
    try:
        stats = [(folder / file).stat() for file in (CONFIG, WEIGHTS)]
    except OSError as error:
        raise InputError(f"the adapter's files are gone ({error.strerror})", file=folder) from None
    return tuple(number for stat in stats for number in (stat.st_size, stat.st_mtime_ns))
