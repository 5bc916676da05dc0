"""Rows from a data set on the Hugging Face hub: `hub:owner/name:split`, through the optional `datasets` package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tunesmith.data.rows import Row
from tunesmith.errors import InputError
from tunesmith.home import offline
from tunesmith.types import Source

PREFIX = "hub:"
ADDRESS = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+|[\w.-]+)(?::(?P<split>[\w.-]+))?")


def hub_rows(address: str) -> Iterator[Row]:
    """Stream the rows of a hub data set; `line` is the 1-based row number. Raises InputError.

    Only data files are read: `datasets` 4 and later no longer runs a repository's own loading code.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise InputError("a hub data set is written hub:owner/name:split", file=address)
    if offline():
        raise InputError("TUNESMITH_OFFLINE forbids fetching it; name a local file", file=address)
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            "reading from the hub needs the `datasets` package; run: pip install 'tunesmith[hub]'", file=address
        ) from None
    try:
        rows = load_dataset(match["name"], split=match["split"] or "train", streaming=True)
        for number, fields in enumerate(rows, start=1):
            yield Row(_plain(fields), Source(address, number))
    except (OSError, ValueError, RuntimeError) as error:  # datasets and huggingface_hub derive theirs from these
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the hub data set cannot be read ({what})", file=address) from None


def _plain(fields: Any) -> dict[str, Any]:
    return {str(key): value for key, value in dict(fields).items() if value is not None}
