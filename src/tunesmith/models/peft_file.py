"""The file of an adapter's weights, in PEFT's format: what its tensors are called, their shapes, their numbers.

Whether they fit a base is peft_format.py's to say.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.errors import InputError

WEIGHTS = "adapter_model.safetensors"
BASE_QUANTIZE = "base_quantize"  # in the metadata of the weights, which PEFT passes over: how the base was quantised
MAGNITUDE, TOKENS = "magnitude_vector", "trainable_tokens_delta"  # parts of an adapter besides A and B
TENSOR = re.compile(
    r"base_model\.model\.(?P<layer>.+)\."
    r"(?P<part>lora_(embedding_)?[AB]|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)(\.default)?(\.weight)?"
)


def trained_over(folder: Path) -> str | None:
    """How the base was quantised that an adapter says it was trained over. Raises InputError."""
    return read_header(folder)[1].get(BASE_QUANTIZE)


def read_header(folder: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shapes of the tensors by name, and the metadata."""
    path = _weights_file(folder)
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by name. Raises InputError, also where an adapter's own ones are not finite."""
    path = _weights_file(folder)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    for key in filter(place_of, tensors):
        numbers = tensors[key].float()
        # A sum is finite only where all numbers are, and five times as fast to make sure of; it may itself overflow.
        if not (math.isfinite(numbers.sum().item()) or torch.isfinite(numbers).all()):
            raise InputError(f"{key} holds numbers that are not finite; the adapter is broken", file=path)
    return tensors


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


def place_of(key: str) -> tuple[str, str] | None:
    """The layer and the part (A, B, ...) that a tensor's name says; None where it is no part of an adapter."""
    match = TENSOR.fullmatch(key)
    if match is None:
        return None
    return match["layer"], match["part"].rpartition(".")[2].removeprefix("lora_").removeprefix("embedding_")


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"the adapter's weights are damaged ({error})", file=path)
