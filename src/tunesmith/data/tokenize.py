"""From examples to token ids and weights, built together by the one renderer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tunesmith.data.parts import STANDING_ROLES
from tunesmith.errors import InputError
from tunesmith.recipe import Data
from tunesmith.types import Example, Message, Source, TokenizedExample

Rendered = tuple[Sequence[int], Sequence[float]]


class Renderer(Protocol):
    """What this package asks of chat.renderer.Renderer."""

    def chat_example(self, messages: Sequence[Message], tools: Sequence[dict], train_on: str) -> list[Rendered]: ...
    def completion_example(self, prompt: str, completion: str) -> Rendered: ...
    def text_example(self, text: str) -> Rendered: ...
