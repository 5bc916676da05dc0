"""Which engine answers for a base: the own one, or, where an address is given, a vLLM server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.chat.renderer import Renderer
from tunesmith.engine.engine import Engine
from tunesmith.engine.vllm import VllmEngine
from tunesmith.errors import InputError
from tunesmith.models.loading import LoadedBase
from tunesmith.models.lora import LoraModel
from tunesmith.recipe import Quantize

AnyEngine = Engine | VllmEngine


def open_engine(
    model: str | Path,
    *,
    vllm: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    quantize: Quantize | None = None,
    **settings: Any,
) -> AnyEngine:
    """`settings` are Engine's; those of weights and memory are the server's own affair. Raises InputError."""
    if vllm is None:
        return Engine(model, adapters, quantize=quantize, **settings)
    if quantize is not None:
        raise InputError(
            f"the base is quantised ({quantize}), and a vLLM server answers over its own numbers; write the run's own "
            "with tunesmith export --to merged, and serve and prove that"
        )
    engine = VllmEngine.over(vllm, str(model), revision=settings.get("revision"), system=settings.get("system"))
    for name, folder in (adapters or {}).items():
        engine.add_adapter(name, folder)
    return engine


def engine_over(base: LoadedBase, lora: LoraModel, renderer: Renderer, **settings: Any) -> Engine:
    """The own engine over a base that is in memory already, with the adapters it carries; `settings` of Engine.over."""
    return Engine.over(
        lora,
        renderer,
        context_length=base.context_length,
        tokenizer=base.tokenizer,
        name=base.name,
        **settings,
    )
