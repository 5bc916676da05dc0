"""The adapters an engine knows by name."""

from __future__ import annotations

import itertools
from pathlib import Path

from tunesmith.errors import InputError
from tunesmith.models.lora import LoraModel
from tunesmith.models.peft_format import load_adapter, remove_adapter


class Adapters:
    """Names and their weights in the model's LoRA layers. Each gets a key of its own, which tells caches apart."""

    def __init__(self, lora: LoraModel, base: str) -> None:
        self._lora, self._base = lora, base
        self._keys: dict[str, int] = {}
        self._numbers = itertools.count()

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter under a new name. Raises InputError."""
        if name in self._keys or self._carried(name):
            raise InputError(f'there is already an adapter "{name}"; remove it first or choose another name')
        load_adapter(self._lora, name, folder)
        self._keys[name] = next(self._numbers)

    def remove(self, name: str) -> None:
        """Take an adapter away. Raises InputError if there is none of that name."""
        self.key(name)
        self._keys.pop(name, None)
        remove_adapter(self._lora, name)

    def key(self, name: str | None) -> int | str | None:
        """What the cache knows the adapter by. Raises InputError if there is none of that name."""
        if name is None:
            return None
        if name in self._keys:
            return self._keys[name]
        if self._carried(name):  # put on the model by someone else: a live model in training
            return name
        known = ", ".join(sorted({*self._keys, *self._all_carried()})) or "none"
        raise InputError(f'there is no adapter "{name}" on {self._base}; known: {known}')

    def clear(self) -> None:
        """Take away all that were added here."""
        for name in list(self._keys):
            self.remove(name)

    def _carried(self, name: str) -> bool:
        return any(name in layer.adapters for layer in self._lora.layers.values())

    def _all_carried(self) -> set[str]:
        return {name for layer in self._lora.layers.values() for name in layer.adapters}
