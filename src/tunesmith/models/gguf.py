"""Read a GGUF file's model: its configuration and its weights, in transformers' names and layout.

llama.cpp renames every tensor and rearranges some; each architecture below undoes exactly that. A file that says
something about its computation which is not understood here is refused, never approximated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tunesmith.errors import InputError

Array = npt.NDArray[Any]
Rearrange = Callable[[str, Array, dict[str, Any]], Array]

REMEDY = "use the model's safetensors files instead (a hub id or a folder)"


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures maps onto a transformers model."""

    model_type: str
    keys: dict[str, str]  # metadata key without its prefix -> config key
    names: tuple[tuple[str, str], ...]  # pattern in the tensor's name -> its place in transformers
    rows: Rearrange = lambda name, weight, config: weight  # undoes a permutation of rows
    turn: Rearrange = lambda name, weight, config: weight  # undoes a transposition
    states_head_dim: bool = True


class GGUFFile:
    """An opened GGUF file. Tensors are mapped, not read, until asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            fields = {name: field.contents() for name, field in self._reader.fields.items()}
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"not a whole GGUF file ({error}); fetch it again", file=path) from None
        self.fields: dict[str, Any] = fields
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(fields.get("general.architecture"))

    def about(self, key: str, default: Any = None) -> Any:
        """A value of the file's own architecture: `about("block_count")` is `llama.block_count`."""
        return self.fields.get(f"{self.architecture}.{key}", default)

    def values(self, name: str) -> Array:
        """A tensor's values as float32, whatever blocks it is stored in, in torch's order of dimensions."""
        tensor = self.tensors[name]
        try:
            return np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise InputError(
                f"tensor {name} is stored as {kind}, which cannot be read; {REMEDY}", file=self.path
            ) from None


def read_config(file: GGUFFile) -> dict[str, Any]:
    """The transformers configuration the file describes. Raises InputError where it cannot be rebuilt exactly."""
    architecture = _architecture(file)
    _refuse_unsupported(file)
    config: dict[str, Any] = {"model_type": architecture.model_type}
    for key, name in architecture.keys.items():
        value = file.about(key)
        if value is not None:
            config[name] = value
    missing = [key for key in ("block_count", "embedding_length", "attention.head_count") if file.about(key) is None]
    if missing:
        raise InputError(f"the metadata lacks {file.architecture}.{missing[0]}; fetch the file again", file=file.path)
    if architecture.states_head_dim:
        stated = file.about("attention.key_length") or file.about("rope.dimension_count")
        config["head_dim"] = stated or file.about("embedding_length") // file.about("attention.head_count")
        if file.about("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
            raise InputError(f"it rotates a part of each head only; {REMEDY}", file=file.path)
    if theta := file.about("rope.freq_base"):
        config["rope_parameters"] = _rope(file, config, theta)
    if "token_embd.weight" not in file.tensors:
        raise InputError("the file lacks the weight token_embd.weight; fetch it again", file=file.path)
    config["vocab_size"] = int(file.tensors["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    return config


def read_weights(file: GGUFFile, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """Every weight as (transformers' name, float32 values), one at a time. Raises InputError for an unknown tensor."""
    architecture = _architecture(file)
    for name in file.tensors:
        if name == "rope_freqs.weight":
            continue  # read into the configuration
        place = _place(architecture, name)
        if place == name:
            raise InputError(f"tensor {name} has no place in a {file.architecture} model; {REMEDY}", file=file.path)
        yield place, architecture.turn(name, architecture.rows(name, file.values(name), config), config)


def read_blocks(file: GGUFFile, config: dict[str, Any]) -> Iterator[tuple[str, str, Array]]:
    """Every matrix as (transformers' name, kind of block, bytes [out, bytes of a row]), one at a time.

    Never transposed: also where transformers keeps [in, out].
    """
    architecture = _architecture(file)
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 2:
            rows = np.asarray(tensor.data).reshape(int(tensor.shape[1]), -1).view(np.uint8)
            yield _place(architecture, name), tensor.tensor_type.name, architecture.rows(name, rows, config)


def _place(architecture: Architecture, name: str) -> str:
    """A tensor's name in transformers; the same name where it has none."""
    place = name
    for pattern, replacement in architecture.names:
        place = re.sub(pattern, replacement, place)
    return place


def _architecture(file: GGUFFile) -> Architecture:
    architecture = ARCHITECTURES.get(file.architecture)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(
            f"architecture {file.architecture} is not read from GGUF ({known} are); {REMEDY}", file=file.path
        )
    return architecture


def _refuse_unsupported(file: GGUFFile) -> None:
    """Metadata that changes the computation in a way not rebuilt here."""
    if file.about("expert_count"):
        raise InputError(f"a mixture of experts is not read from GGUF; {REMEDY}", file=file.path)
    scaling = file.about("rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"rope scaling of type {scaling} is not read from GGUF; {REMEDY}", file=file.path)


def _rope(file: GGUFFile, config: dict[str, Any], theta: float) -> dict[str, Any]:
    """How positions are rotated."""
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, config["head_dim"], theta)
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_rope(file: GGUFFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Recognise Llama 3.1's stretched rotation in the per-frequency divisors that llama.cpp stores in its place.

    The divisor is 1 for wavelengths under 8192 / 4, `factor` for those over 8192, and blends in between.
    """
    divisors = file.values("rope_freqs.weight")
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape != smooth.shape or not np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-3):
        raise InputError(f"its rotary frequencies are not those of Llama 3.1; {REMEDY}", file=file.path)
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _unpermute_llama(name: str, weight: Array, config: dict[str, Any]) -> Array:
    """llama.cpp interleaves the two halves of every q and k head: [h, 2, d/2] became [h, d/2, 2]."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return weight
    interleaved = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(interleaved.swapaxes(1, 2)).reshape(weight.shape)


def _transpose_gpt2(name: str, weight: Array, config: dict[str, Any]) -> Array:
    """GPT-2's Conv1D keeps [in, out]; llama.cpp stores [out, in]."""
    is_linear = re.search(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$", name)
    return np.ascontiguousarray(weight.T) if is_linear else weight


COMMON_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
COMMON_NAMES = (
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blk\.(\d+)\.attn_([qkv])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^blk\.(\d+)\.attn_([qk])_norm\.", r"model.layers.\1.self_attn.\2_norm."),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
)
LLAMA_NAMES = (*COMMON_NAMES, (r"^blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."))
GPT2_NAMES = (
    (r"^token_embd\.", "transformer.wte."),
    (r"^position_embd\.", "transformer.wpe."),
    (r"^output_norm\.", "transformer.ln_f."),
    (r"^output\.", "lm_head."),
    (r"^blk\.(\d+)\.attn_norm\.", r"transformer.h.\1.ln_1."),
    (r"^blk\.(\d+)\.ffn_norm\.", r"transformer.h.\1.ln_2."),
    (r"^blk\.(\d+)\.attn_qkv\.", r"transformer.h.\1.attn.c_attn."),
    (r"^blk\.(\d+)\.attn_output\.", r"transformer.h.\1.attn.c_proj."),
    (r"^blk\.(\d+)\.ffn_up\.", r"transformer.h.\1.mlp.c_fc."),
    (r"^blk\.(\d+)\.ffn_down\.", r"transformer.h.\1.mlp.c_proj."),
)
ARCHITECTURES = {
    "llama": Architecture("llama", COMMON_KEYS, LLAMA_NAMES, _unpermute_llama),
    "qwen2": Architecture("qwen2", COMMON_KEYS, LLAMA_NAMES, states_head_dim=False),
    "qwen3": Architecture("qwen3", COMMON_KEYS, LLAMA_NAMES),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        GPT2_NAMES,
        turn=_transpose_gpt2,
        states_head_dim=False,
    ),
}
