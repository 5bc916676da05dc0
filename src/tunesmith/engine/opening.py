"""Which engine answers for a base: the own one, or, where an address is given, a vLLM server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.engine.engine import Engine
from tunesmith.engine.vllm import VllmEngine

AnyEngine = Engine | VllmEngine


def open_engine(model: str | Path, *, vllm: str | None = None, **settings: Any) -> AnyEngine:
    """`settings` are Engine's; those of weights and memory are the server's own affair. Raises InputError."""
    if vllm is None:
        return Engine(model, **settings)
    return VllmEngine.over(vllm, str(model), revision=settings.get("revision"), system=settings.get("system"))
