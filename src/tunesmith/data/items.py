"""Held-out rows as the contenders meet them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tunesmith.chat.parse import spoken
from tunesmith.data.parts import answer_text, asked_turns
from tunesmith.types import Example, Item


def items(examples: Sequence[Example]) -> list[Item]:
    """One item a row: all turns before the last assistant turn (or the prompt), and the answer expected.

    What was thought before the answer is not expected. A tool call is expected as JSON, `[{"name": …, "arguments":
    …}]`. Text rows ask nothing and give no item. Equal rows get ids of their own: `1f…`, `1f…-2`.
    """
    found: list[Item] = []
    seen: Counter[str] = Counter()
    for example in examples:
        if example.kind == "text":
            continue
        seen[example.id] += 1
        copy = seen[example.id]
        found.append(
            Item(
                id=example.id if copy == 1 else f"{example.id}-{copy}",
                source=example.source,
                messages=asked_turns(example),
                tools=example.tools,
                prompt=example.prompt,
                expected=spoken(answer_text(example)),
                columns=example.columns,
            )
        )
    return found
