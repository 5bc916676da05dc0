"""Load a base: safetensors only, no code from the model's folder, one float type throughout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tunesmith.errors import InputError
from tunesmith.models.catalogue import Resolved, gguf_file, resolve
from tunesmith.models.memory import share_one_heap
from tunesmith.models.quantise import quantise, stored_type
from tunesmith.recipe import Quantize

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base in memory, in eval mode and frozen."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: Path
    revision: str | None  # the commit of a hub model
    weights_hash: str
    context_length: int  # tokens
    device: torch.device
    stop_ids: frozenset[int]  # the tokens at which the base itself ends an answer
    quantize: Quantize | None = None  # how its linears are kept
    template_tokens: tuple[int, ...] | None = None  # special tokens of a chat template that it did not come with


def load_base(
    model: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: Device | str = "auto",
    quantize: Quantize | None = None,
) -> LoadedBase:
    """Find a base by name (catalogue, hub id, folder, .gguf file), fetch it if needed, and load it.

    `dtype` auto is bfloat16 on a device that computes in it, float32 elsewhere; `quantize` as in the recipe.
    Raises InputError.
    """
    share_one_heap()
    blocks = gguf_file(model) if quantize == "keep" else None
    resolved = resolve(model, revision)
    place = pick_device(device)
    numbers = pick_dtype(dtype, place)
    if quantize is None:
        weights = _load_weights(resolved, numbers)
    else:
        weights = _load_weights(resolved, stored_type(resolved.folder) or numbers)
        quantise(weights, quantize, numbers, blocks)
    weights.to(place).eval().requires_grad_(False)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(resolved.folder)
    _check_vocabulary(weights, tokenizer, resolved.folder)
    return LoadedBase(
        model=weights,
        tokenizer=tokenizer,
        name=resolved.name,
        folder=resolved.folder,
        revision=resolved.revision,
        weights_hash=resolved.weights_hash,
        context_length=_context_length(weights, tokenizer),
        device=place,
        stop_ids=_stop_ids(weights),
        quantize=quantize,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model's folder, exactly as its tokenizer.json has it. Raises InputError.

    AutoTokenizer may build the tokenizer anew in the way of the model's class, whatever the file says; here it only
    names the special tokens that a class takes for granted (GPT-2's files do not even name their end of text).
    """
    try:
        if not (folder / "tokenizer.json").is_file():
            tokenizer = _class_tokenizer(folder)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            if tokenizer.eos_token is None:
                named, known = _class_tokenizer(folder).special_tokens_map, tokenizer.get_vocab()
                tokenizer.add_special_tokens({name: token for name, token in named.items() if token in known})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"its tokenizer cannot be loaded ({_first_line(error)})", file=folder) from None
    if not tokenizer.is_fast:
        raise InputError("its tokenizer has no fast form (tokenizer.json); save it as one first", file=folder)
    return tokenizer


def _class_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return loaded


def pick_device(device: Device | str) -> torch.device:
    """auto: CUDA where there is one, then Apple's GPU, then the CPU. Raises InputError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.partition(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(kind, False):
        raise InputError(f'runtime.device "{device}" is not on this machine; use auto or cpu')
    return torch.device(device)


def pick_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on CUDA that computes in it, else float32. Halved types on a CPU are slower, not faster."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def _load_weights(resolved: Resolved, dtype: torch.dtype) -> PreTrainedModel:
    folder = resolved.folder
    _refuse_quantised(folder)
    transformers_logging.disable_progress_bar()  # a bar for half a second of work only hides what matters
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the model cannot be loaded ({_first_line(error)})", file=folder) from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise InputError(
            f"the weights lack {missing[0]} and {len(missing) - 1} more; copy the model again", file=folder
        )
    return model


def _refuse_quantised(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"its config.json is not valid JSON ({_first_line(error)}); copy it again", file=folder
        ) from None
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise InputError(f"its weights are quantised ({method}); use the model's unquantised weights", file=folder)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Every ordinary token and both ends of a text need a row. (Gemma 3 1B's tokenizer has one picture token more.)"""
    table = model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    ends = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(token, int)]
    needed, rows = max(tokenizer.vocab_size, *(end + 1 for end in ends), 1), table.shape[0]
    if needed > rows:
        raise InputError(
            f"the tokenizer has {needed} tokens but the model only {rows}; use the model's own tokenizer", file=folder
        )


def _stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """Every end-of-sequence token of the generation configuration, one or a list there."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([stated] if isinstance(stated, int) else stated or ())


def _context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model was made for, by its configuration, else by its tokenizer."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if stated:
        return int(stated)
    # Models without a limit of their own (ALiBi, recurrent) leave the tokenizer's, which may be a huge number.
    return int(tokenizer.model_max_length) if tokenizer.model_max_length < 1 << 24 else 2048


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
