"""A long prompt that `objective.kind: compress` is to make needless: where it comes from, and where it stands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from tunesmith.data.parts import STANDING_ROLES
from tunesmith.data.turns import read_turns
from tunesmith.errors import InputError
from tunesmith.recipe import Compress
from tunesmith.recipe_file import read_text_file
from tunesmith.types import Message, Source


def read_prompt(section: Compress) -> tuple[Message, ...]:
    """The prompt as turns: a text is one system turn, a .json file holds the turns themselves. Raises InputError."""
    if section.prompt_file is None:
        return _system_turn(section.prompt or "", "objective.prompt")
    path = Path(section.prompt_file)
    text = read_text_file(path, "prompt")
    if path.suffix != ".json":
        return _system_turn(text.strip(), str(path))
    try:
        turns = read_turns(json.loads(text), Source(str(path), 1))
    except (ValueError, RecursionError):
        raise InputError("it is not valid JSON; a prompt in turns is a list of messages", file=path) from None
    if turns[-1]["role"] == "user":
        raise InputError(
            "the prompt ends in a question, and each row asks its own; end it with an answer or the system turn",
            file=path,
        )
    return turns


def _system_turn(text: str, where: str) -> tuple[Message, ...]:
    if not text.strip():
        raise InputError("the prompt is empty, so there is nothing to compress", file=where)
    return ({"role": "system", "content": text},)


def with_prompt(prompt: Sequence[Message], messages: Sequence[Message]) -> tuple[Message, ...]:
    """The row's turns behind the prompt's. There is one system turn: the prompt's text, then the row's own."""
    standing = [turn for turn in (*prompt, *messages) if turn["role"] in STANDING_ROLES]
    talk = [turn for turn in (*prompt, *messages) if turn["role"] not in STANDING_ROLES]
    text = "\n\n".join(turn.get("content") or "" for turn in standing)
    return (*((cast(Message, {"role": "system", "content": text}),) if text else ()), *talk)
