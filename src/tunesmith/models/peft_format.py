"""Adapters on disk, in the format PEFT and vLLM read: adapter_config.json and adapter_model.safetensors.

What is read is decided by the tensors in the file; the configuration gives their scaling. Anything in an adapter that
cannot be applied exactly is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.errors import InputError
from tunesmith.models.fetch import writing
from tunesmith.models.lora import LoraModel, LoraWeights
from tunesmith.recipe import Adapter as AdapterSection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# Fields of PEFT's configuration that change the computation, and the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter says of itself."""

    base: str | None  # base_model_name_or_path
    revision: str | None
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    layers: tuple[str, ...]


def save_adapter(
    lora: LoraModel, name: str, folder: Path, section: AdapterSection, base_name: str, revision: str | None = None
) -> None:
    """Write an adapter; the configuration last, so a folder that has one is whole. Raises InputError, e.g. a full disk.

    `section` says how scaling is expressed (rslora) and the dropout; ranks come from the weights themselves.
    """
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in lora.parameters(name)}
    assert tensors, f"the model carries no adapter {name}"
    config = _config(lora, name, section, base_name, revision)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{WEIGHTS}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, folder / WEIGHTS)
        partial = folder / f".{CONFIG}.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / CONFIG)


def load_adapter(lora: LoraModel, name: str, folder: Path) -> AdapterFacts:
    """Put an adapter from disk over the base under `name`. Raises InputError; the base is left as it was then."""
    config, sides = read_config(folder), _read_sides(folder)
    ranks = _fitting_ranks(lora, {layer: _shapes(pair) for layer, pair in sides.items()}, config, folder)
    loaded = {layer: _layer_weights(lora, layer, pair, ranks[layer], config) for layer, pair in sides.items()}
    for layer, weights in loaded.items():
        lora.layers[layer].adapters[name] = weights
    return AdapterFacts(
        base=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        rank=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        layers=tuple(sides),
    )


def check_adapter(lora: LoraModel, folder: Path) -> int:
    """Whether an adapter fits the base, by its configuration and its file's header alone; its largest rank.

    Reads no weights, so it costs next to nothing; `load_adapter` may still find them broken. Raises InputError.
    """
    config, path = read_config(folder), _weights_file(folder)
    shapes: dict[str, dict[str, list[int]]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                layer, side = _place(key, path)
                shapes.setdefault(layer, {})[side] = file.get_slice(key).get_shape()
    except (SafetensorError, OSError) as error:
        raise InputError(f"the adapter's weights are damaged ({error})", file=path) from None
    return max(_fitting_ranks(lora, shapes, config, folder).values())


def remove_adapter(lora: LoraModel, name: str) -> None:
    """Take an adapter off every layer."""
    for layer in lora.layers.values():
        layer.adapters.pop(name, None)


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's configuration. Raises InputError where it is missing, broken, or asks for what is not supported."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"this folder holds no {CONFIG}, so it is not an adapter", file=folder) from None
    except (OSError, ValueError) as error:
        raise InputError(f"the adapter's configuration cannot be read ({error})", file=path) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise InputError(f"the adapter is of type {kind}; only LORA is supported", file=path)
    for field, neutral in NEUTRAL.items():
        value = config.get(field, neutral[0])
        if value not in neutral:
            raise InputError(f"the adapter uses {field} ({value}), which is not supported", file=path)
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), int | float) or config[field] <= 0:
            raise InputError(f"{field} is {config.get(field)}; it must be a number above 0", file=path)
    return config


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise InputError(
                "the adapter's weights are pickled, which can run code when loaded; convert them to safetensors",
                file=pickled,
            )
        raise InputError(f"the adapter's folder holds no {WEIGHTS}", file=folder)
    return path


def _place(key: str, path: Path) -> tuple[str, str]:
    """The layer and the side (A or B) that a tensor's name says."""
    match = TENSOR.fullmatch(key)
    if match is None:
        raise InputError(f"the adapter holds {key}, which is no LoRA weight of a linear layer", file=path)
    return match["layer"], match["side"]


def _read_sides(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{layer: {"A": [rank, in], "B": [out, rank]}}, in the file's order of names."""
    path = _weights_file(folder)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"the adapter's weights are damaged ({error})", file=path) from None
    sides: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        layer, side = _place(key, path)
        numbers = tensors[key].float()
        # A sum is finite only where all numbers are, and five times as fast to make sure of; it may itself overflow.
        if not (math.isfinite(numbers.sum().item()) or torch.isfinite(numbers).all()):
            raise InputError(f"{key} holds numbers that are not finite; the adapter is broken", file=path)
        sides.setdefault(layer, {})[side] = numbers
    return sides


def _shapes(pair: dict[str, Tensor]) -> dict[str, list[int]]:
    return {side: list(numbers.shape) for side, numbers in pair.items()}


def _fitting_ranks(
    lora: LoraModel, shapes: dict[str, dict[str, list[int]]], config: dict[str, Any], folder: Path
) -> dict[str, int]:
    """Each adapted layer's rank, where all of them fit the base."""
    if not shapes:
        raise InputError("the adapter is empty: it holds no weights", file=folder / WEIGHTS)
    ranks: dict[str, int] = {}
    for layer, pair in shapes.items():
        target = lora.layers.get(layer)
        if target is None:
            raise InputError(f"the adapter changes {layer}, which is no inner linear layer of this base", file=folder)
        if set(pair) != {"A", "B"}:
            raise InputError(f"the adapter has only one of lora_A and lora_B for {layer}", file=folder)
        rank = int(_by_pattern(config.get("rank_pattern"), layer, config["r"]))
        expected = [rank, target.in_features], [target.out_features, rank]
        if (pair["A"], pair["B"]) != expected:
            raise InputError(
                f"the adapter does not fit this base: at {layer} it has {pair['A']} and {pair['B']} where "
                f"{expected[0]} and {expected[1]} are expected",
                file=folder,
            )
        ranks[layer] = rank
    return ranks


def _layer_weights(
    lora: LoraModel, layer: str, pair: dict[str, Tensor], rank: int, config: dict[str, Any]
) -> LoraWeights:
    alpha = float(_by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"]))
    device = lora.layers[layer].base.weight.device
    return LoraWeights(
        a=nn.Parameter(pair["A"].to(device)),
        b=nn.Parameter(pair["B"].to(device)),
        scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        dropout=float(config.get("lora_dropout") or 0.0),
    )


def _by_pattern(patterns: dict[str, Any] | None, layer: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the layer's name, from the start of a part of it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _config(
    lora: LoraModel, name: str, section: AdapterSection, base_name: str, revision: str | None
) -> dict[str, Any]:
    adapted = {layer: module for layer, module in lora.layers.items() if name in module.adapters}
    ranks = {layer: module.adapters[name].a.shape[0] for layer, module in adapted.items()}
    alphas = {layer: _alpha(module.adapters[name], section.rslora) for layer, module in adapted.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": section.dropout,
        "use_rslora": section.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(module.transposed for module in adapted.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
        "target_modules": _target_modules(lora, list(adapted)),
    }


def _alpha(weights: LoraWeights, rslora: bool) -> float:
    """The alpha that gives a layer's scaling back; an integer where it is one."""
    rank = weights.a.shape[0]
    alpha = round(weights.scaling * (math.sqrt(rank) if rslora else rank), 9)
    return int(alpha) if alpha == int(alpha) else alpha


def _target_modules(lora: LoraModel, adapted: list[str]) -> list[str]:
    """Short names (`q_proj`) where PEFT would select exactly the adapted layers by them, else full names."""
    wrapped = tuple(f"{layer}." for layer in lora.layers)
    every = [module for module, _ in lora.model.named_modules() if not module.startswith(wrapped)]
    short = sorted({layer.rpartition(".")[2] for layer in adapted})
    selected = {module for module in every if module.rpartition(".")[2] in short}
    return short if selected == set(adapted) else sorted(adapted)
