"""A row as it was found, and what can be wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import InputError
from tunesmith.types import Source


class RowError(InputError):
    """One row that can't be read, while the rows after it still can. `rule` is the gate's name for the fault."""

    def __init__(self, message: str, *, rule: str, source: Source) -> None:
        self.rule, self.source = rule, source
        super().__init__(message, file=source.file, line=source.line)


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of one row, not yet interpreted."""

    fields: Mapping[str, Any]
    source: Source
