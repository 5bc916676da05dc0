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
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.disk import os_errors
from tunesmith.errors import InputError
from tunesmith.models.embedding import LoraEmbedding, TokenRows
from tunesmith.models.lora import LoraModel, LoraWeights
from tunesmith.models.peft_file import BASE_QUANTIZE, MAGNITUDE, TOKENS, WEIGHTS, place_of, read_header, read_tensors
from tunesmith.models.quantised import quantisation
from tunesmith.recipe import Adapter as AdapterSection

CONFIG = "adapter_config.json"
# What the base has at one of its ends, which PEFT may save as well.
BASE_COPY = re.compile(r"base_model\.model\.(?P<layer>.+?)(\.token_adapter)?(\.base_layer)?\.weight")
# Fields of PEFT's configuration that change the computation, and the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "ensure_weight_tying": (None, False),
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


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """What an adapter takes in memory."""

    rank: int  # its largest one in the inner linears, 0 where it has none there
    inner: int  # bytes
    ends: int  # bytes over the embedding and the head


@dataclass(frozen=True, slots=True)
class _Fit:
    """How an adapter's tensors lie over the base."""

    ranks: dict[str, int]  # by layer
    tokens: dict[str, list[int]]  # ids of the tokens whose rows it brings, by end


def save_adapter(
    lora: LoraModel, name: str, folder: Path, section: AdapterSection, base_name: str, revision: str | None = None
) -> None:
    """Write an adapter; the configuration last, so a folder that has one is whole. Raises OSError, e.g. a full disk.

    `section` says how scaling is expressed (rslora) and the dropout; ranks come from the weights themselves.
    """
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in lora.parameters(name)}
    assert tensors, f"the model carries no adapter {name}"
    config = _config(lora, name, section, base_name, revision)
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{WEIGHTS}.partial"
        save_file(tensors, partial, metadata=_metadata(lora))
        os.replace(partial, folder / WEIGHTS)
        partial = folder / f".{CONFIG}.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / CONFIG)


def load_adapter(lora: LoraModel, name: str, folder: Path) -> AdapterFacts:
    """Put an adapter from disk over the base under `name`. Raises InputError; the base is left as it was then."""
    config = read_config(folder)
    fit = _fit(lora, _read_shapes(lora, folder), config, folder)
    parts = _read_parts(lora, folder)
    tokens = _token_rows(lora, fit, parts)
    loaded = {layer: _layer_weights(lora, parts[layer], rank, config, layer) for layer, rank in fit.ranks.items()}
    for layer, weights in loaded.items():
        lora.everywhere[layer].adapters[name] = weights
    for end, rows in tokens.items():
        lora.ends[end].tokens[name] = rows
    return AdapterFacts(
        base=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        rank=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        layers=tuple(fit.ranks),
    )


def check_adapter(lora: LoraModel, folder: Path) -> AdapterSize:
    """Whether an adapter fits the base, by its configuration and its file's header alone; how large it is.

    Reads no weights, so it costs next to nothing; `load_adapter` may still find them broken. Raises InputError.
    """
    config, shapes = read_config(folder), _read_shapes(lora, folder)
    fit = _fit(lora, shapes, config, folder)
    sizes = {layer: 4 * sum(math.prod(shape) for shape in parts.values()) for layer, parts in shapes.items()}
    ends = sum(size for layer, size in sizes.items() if layer in lora.ends)
    rank = max((rank for layer, rank in fit.ranks.items() if layer in lora.layers), default=0)
    return AdapterSize(rank, sum(sizes.values()) - ends, ends)


def remove_adapter(lora: LoraModel, name: str, *, inner: bool = False) -> None:
    """Take an adapter off every layer, or off the inner ones alone."""
    for layer in (lora.layers if inner else lora.everywhere).values():
        layer.adapters.pop(name, None)
        layer.tokens.pop(name, None)


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


def _read_shapes(lora: LoraModel, folder: Path) -> dict[str, dict[str, list[int]]]:
    """{layer: {"A": [rank, in], "B": [out, rank], "magnitude_vector": [out]}}, in the file's order of names."""
    tensors, metadata = read_header(folder)
    _refuse_other_numbers(lora, metadata.get(BASE_QUANTIZE), folder)
    shapes: dict[str, dict[str, list[int]]] = {}
    for key, shape in tensors.items():
        place = place_of(key)
        if place is not None:
            shapes.setdefault(place[0], {})[place[1]] = shape
        elif _copied(lora, key, shape) is None:
            raise _unknown(key, folder)
    return shapes


def _read_parts(lora: LoraModel, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors at the same places, float32."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder).items():
        place = place_of(key)
        if place is not None:
            parts.setdefault(place[0], {})[place[1]] = tensor.float()
            continue
        own = _copied(lora, key, list(tensor.shape))
        if own is None or not torch.equal(tensor.to(own.device, own.dtype), own):
            raise _unknown(key, folder)
    return parts


def _copied(lora: LoraModel, key: str, shape: list[int]) -> Tensor | None:
    """What the base has at one of its ends, where a tensor by its name and shape is a copy of that."""
    match = BASE_COPY.fullmatch(key)
    end = None if match is None else lora.ends.get(match["layer"])
    return end.base.weight if end is not None and list(end.base.weight.shape) == shape else None


def _unknown(key: str, folder: Path) -> InputError:
    return InputError(f"the adapter holds {key}, which is no LoRA weight of a linear layer", file=folder / WEIGHTS)


def _metadata(lora: LoraModel) -> dict[str, str]:
    how = quantisation(lora.model)
    return {"format": "pt"} if how is None else {"format": "pt", BASE_QUANTIZE: how}


def _refuse_other_numbers(lora: LoraModel, trained: str | None, folder: Path) -> None:
    """Raises InputError where the adapter says it was trained over a base quantised otherwise.

    One that says nothing comes from a plain base or from elsewhere, and may be used over any.
    """
    here = quantisation(lora.model)
    if trained is not None and trained != here:
        raise InputError(
            f"the adapter was trained over its base in {trained}, and this base is "
            f"{'not quantised' if here is None else f'in {here}'}; load the base with quantize {trained}",
            file=folder,
        )


def _fit(lora: LoraModel, shapes: dict[str, dict[str, list[int]]], config: dict[str, Any], folder: Path) -> _Fit:
    """How tensors of these shapes lie over the base. Raises InputError where one does not fit."""
    if not shapes:
        raise InputError("the adapter is empty: it holds no weights", file=folder / WEIGHTS)
    tokens = _token_ids(lora, shapes, config, folder)
    ranks: dict[str, int] = {}
    for layer, found in shapes.items():
        parts = {part: shape for part, shape in found.items() if not (part == TOKENS and layer in tokens)}
        if parts:
            ranks[layer] = _rank(lora, layer, parts, config, folder)
    return _Fit(ranks, tokens)


def _token_ids(
    lora: LoraModel, shapes: dict[str, dict[str, list[int]]], config: dict[str, Any], folder: Path
) -> dict[str, list[int]]:
    """The tokens whose rows an adapter brings, by the end they are for."""
    indices: Any = config.get("trainable_token_indices") or {}
    named = indices if isinstance(indices, dict) else {_embedding(lora): indices}
    found: dict[str, list[int]] = {}
    for end, layer in lora.ends.items():
        shape = shapes.get(end, {}).get(TOKENS)
        if shape is None:
            continue
        ids = next((ids for name, ids in named.items() if f".{end}".endswith(f".{name}")), [])
        vocabulary, hidden = layer.base.weight.shape
        if shape != [len(ids), hidden] or not all(0 <= i < vocabulary for i in ids):
            raise InputError(
                f"trainable_token_indices does not fit this base: {end} has {vocabulary} rows of {hidden}", file=folder
            )
        found[end] = ids
    if named and not found:
        raise InputError("trainable_token_indices names tokens, but their rows are not there", file=folder)
    return found


def _token_rows(lora: LoraModel, fit: _Fit, parts: dict[str, dict[str, Tensor]]) -> dict[str, TokenRows]:
    """The rows of single tokens by the end they are for; tied ends share the embedding's."""
    found: dict[str, TokenRows] = {}
    for end, ids in fit.tokens.items():
        device = lora.ends[end].base.weight.device
        found[end] = TokenRows(torch.tensor(ids, device=device), nn.Parameter(parts[end][TOKENS].to(device)))
    embedding = _embedding(lora)
    if embedding in found and len({layer.base.weight.data_ptr() for layer in lora.ends.values()}) == 1:
        found = dict.fromkeys(lora.ends, found[embedding]) | found
    return found


def _embedding(lora: LoraModel) -> str:
    return next((end for end, layer in lora.ends.items() if isinstance(layer, LoraEmbedding)), "")


def _token_indices(lora: LoraModel, name: str) -> dict[str, list[int]] | None:
    found = {end.rpartition(".")[2]: tokens.ids.tolist() for end, tokens in lora.token_rows(name).items()}
    return found or None


def _rank(lora: LoraModel, layer: str, parts: dict[str, list[int]], config: dict[str, Any], folder: Path) -> int:
    """A layer's rank, where parts of these shapes fit it."""
    target = lora.everywhere.get(layer)
    if target is None:
        raise InputError(f"the adapter changes {layer}, which is no linear layer of this base", file=folder)
    if not {"A", "B"} <= set(parts):
        raise InputError(f"the adapter has only one of lora_A and lora_B for {layer}", file=folder)
    if (MAGNITUDE in parts) != bool(config.get("use_dora")):
        said, there = ("true", "no") if config.get("use_dora") else ("false", "a")
        raise InputError(f"use_dora is {said}, but there is {there} magnitude for {layer}", file=folder)
    rank = int(_by_pattern(config.get("rank_pattern"), layer, config["r"]))
    shapes = {"A": [rank, target.in_features], "B": [target.out_features, rank], MAGNITUDE: [target.out_features]}
    expected = {part: shapes.get(part, []) for part in parts}
    if parts != expected:
        raise InputError(
            f"the adapter does not fit this base: at {layer} it has {_listed(parts)} where {_listed(expected)} are "
            "expected",
            file=folder,
        )
    return rank


def _layer_weights(
    lora: LoraModel, parts: dict[str, Tensor], rank: int, config: dict[str, Any], layer: str
) -> LoraWeights:
    alpha = float(_by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"]))
    device, magnitude = lora.model.device, parts.get(MAGNITUDE)
    return LoraWeights(
        a=nn.Parameter(parts["A"].to(device)),
        b=nn.Parameter(parts["B"].to(device)),
        scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        dropout=float(config.get("lora_dropout") or 0.0),
        magnitude=None if magnitude is None else nn.Parameter(magnitude.to(device)),
    )


def _listed(shapes: dict[str, list[int]]) -> str:
    return " and ".join(str(shape) for shape in shapes.values())


def _by_pattern(patterns: dict[str, Any] | None, layer: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the layer's name, from the start of a part of it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _config(
    lora: LoraModel, name: str, section: AdapterSection, base_name: str, revision: str | None
) -> dict[str, Any]:
    adapted = {layer: module for layer, module in lora.everywhere.items() if name in module.adapters}
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
        "trainable_token_indices": _token_indices(lora, name),
        "use_dora": any(module.adapters[name].magnitude is not None for module in adapted.values()),
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
    wrapped = tuple(f"{layer}." for layer in lora.everywhere)
    every = [module for module, _ in lora.model.named_modules() if not module.startswith(wrapped)]
    short = sorted({layer.rpartition(".")[2] for layer in adapted})
    selected = {module for module in every if module.rpartition(".")[2] in short}
    return short if selected == set(adapted) else sorted(adapted)
