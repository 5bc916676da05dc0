"""Put quantised linears in the place of a base's own, one by one, so that memory never holds both for long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import InputError
from tunesmith.models.folders import weight_files
from tunesmith.models.gguf import GGUFFile, read_blocks, read_config
from tunesmith.models.gguf_blocks import KINDS, Blocks
from tunesmith.models.int8 import Int8
from tunesmith.models.lora import linears
from tunesmith.models.memory import trim_heap
from tunesmith.models.nf4 import Nf4
from tunesmith.models.quantised import QuantisedLinear, Stored, quantised_linears
from tunesmith.recipe import Quantize

Places = dict[str, Stored]
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@torch.no_grad()
def quantise(model: PreTrainedModel, how: Quantize, dtype: torch.dtype, source: Path | None = None) -> None:
    """Every linear but the head becomes a QuantisedLinear computing in `dtype`; all else is kept in `dtype`.

    `source`: the GGUF file whose blocks `keep` keeps. Raises InputError for one it can't.
    """
    kept = {} if source is None else _file_blocks(source, set(linears(model)))
    make: dict[str, Callable[[Tensor], Stored]] = {"nf4": Nf4, "int8": Int8}
    for name, linear in linears(model).items():
        assert isinstance(linear, nn.Linear | Conv1D), "a base is quantised once"
        matrix = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
        stored = kept.pop(name) if source is not None else make[how](matrix)
        assert stored.shape == tuple(matrix.shape)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, QuantisedLinear(stored, linear, how, dtype))
        del linear, matrix
        trim_heap()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype, copy=True)  # a copy lets the mapped weights file go
    trim_heap()


def stored_type(folder: Path) -> torch.dtype | None:
    """The type that all weights of a folder have, or None where they have several: loaded so they are only mapped."""
    found = set()
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    return TORCH_TYPES.get(found.pop()) if len(found) == 1 else None


def _file_blocks(path: Path, names: set[str]) -> Places:
    """The blocks of these linears. Raises InputError where one is of a kind that can't be kept."""
    file = GGUFFile(path)
    places: Places = {}
    for weight, kind, rows in read_blocks(file, read_config(file)):
        name = weight.removesuffix(".weight")
        if name not in names:
            continue
        if kind not in KINDS:
            raise InputError(
                f"{weight} is stored as {kind}, which quantize keep can't train over ({', '.join(KINDS)} it can); use "
                "quantize nf4, or a file of another kind",
                file=path,
            )
        places[name] = Blocks(kind, rows)
    if missing := sorted(names - places.keys()):
        raise InputError(f"the file lacks the weight {missing[0]}; fetch it again", file=path)
    return places


def describe(model: PreTrainedModel, how: Quantize) -> str:
    """`base in nf4: 106,168,320 weights of its linears at 0.516 bytes each, 55 MB`"""
    found = quantised_linears(model)
    numbers = sum(linear.in_features * linear.out_features for linear in found)
    size = sum(linear.stored.bytes for linear in found)
    return f"base in {how}: {numbers:,} weights of its linears at {size / numbers:.3f} bytes each, {size / 1e6:.0f} MB"
