"""Convert a GGUF file once into the Hugging Face layout, so that every later load is fast and needs no GGUF code."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from tunesmith.disk import flush
from tunesmith.errors import InputError
from tunesmith.models.fetch import readable_size, sha256_of, writing
from tunesmith.models.folders import FORMAT, MANIFEST, remember_hash
from tunesmith.models.gguf import REMEDY, GGUFFile, read_config, read_weights
from tunesmith.models.gguf_tokenizer import read_tokenizer, stop_ids

SHARD_BYTES = 2 << 30


def convert(source: Path, folder: Path, *, source_sha256: str) -> None:
    """Make `folder` from a GGUF file: written beside, synced, then renamed, so a half-made one never stands there."""
    print(f"converting {source.name} ({readable_size(source.stat().st_size)}), once", file=sys.stderr, flush=True)
    file = GGUFFile(source)
    with writing(folder.parent):
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".partial-{folder.name}-"))
        try:
            scratch.chmod(0o755)
            _write_model(file, scratch)
            hashes = _write_manifest(scratch, {"file": source.name, "sha256": source_sha256})
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(scratch, folder)
            for name, digest in hashes.items():
                remember_hash(folder / name, digest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_model(file: GGUFFile, folder: Path) -> None:
    tokenizer = read_tokenizer(file)
    try:
        facts = read_config(file)
        config = AutoConfig.for_model(**facts)
        expected = _expected_shapes(config)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"its metadata describes no model ({reason}); fetch it again", file=file.path) from None
    stops = stop_ids(file)
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    _check_space(folder, 4 * sum(math.prod(shape) for shape in expected.values()))
    found = _write_weights(file, facts, expected, folder)
    if missing := sorted(set(expected) - found):
        raise InputError(f"the file lacks the weight {missing[0]}; fetch it again", file=file.path)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=stops or None, bos_token_id=tokenizer.bos_token_id).save_pretrained(folder)


def _expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every weight the model has, tied copies left out; also names the model's class in the configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in tied}


def _check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"the conversion needs up to {readable_size(need)} but {readable_size(free)} are free; make room, or set "
            "TUNESMITH_HOME to a folder on another disk",
            file=folder.parent,
        )


def _write_weights(
    file: GGUFFile, facts: dict[str, Any], expected: dict[str, tuple[int, ...]], folder: Path
) -> set[str]:
    """Write the weights in shards of at most about 2 GB, so that a large model passes through little memory."""
    shards: list[dict[str, Tensor]] = [{}]
    where: dict[str, int] = {}
    size = 0
    for name, values in read_weights(file, facts):
        if tuple(values.shape) != expected.get(name):
            raise InputError(
                f"the weight {name} has shape {list(values.shape)} where {list(expected.get(name, ()))} is expected; "
                + REMEDY,
                file=file.path,
            )
        tensor = narrowest(torch.from_numpy(np.array(values)))
        if size and size + tensor.nbytes > SHARD_BYTES:
            _save_shard(shards, folder)
            size = 0
        shards[-1][name] = tensor
        where[name] = len(shards)
        size += tensor.nbytes
    _save_shard(shards, folder)
    if len(shards) == 2:  # one shard and the empty one after it
        os.replace(folder / _shard_name(1), folder / "model.safetensors")
    else:
        index = {"metadata": {}, "weight_map": {name: _shard_name(number) for name, number in where.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return set(where)


def _save_shard(shards: list[dict[str, Tensor]], folder: Path) -> None:
    save_file(shards[-1], folder / _shard_name(len(shards)), metadata={"format": "pt"})
    shards[-1].clear()
    shards.append({})


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def narrowest(values: Tensor) -> Tensor:
    """The smallest floating type that holds float32 `values` exactly.

    Unquantised files come back at their own size. Quantised blocks need float32: a Q4_1 weight is a float16 scale times
    an integer plus a float16 offset, whose sum has more digits than float16 keeps.
    """
    for dtype in (torch.bfloat16, torch.float16):
        narrow = values.to(dtype)
        if torch.equal(narrow.float(), values):
            return narrow
    return values


def _write_manifest(folder: Path, source: dict[str, str]) -> dict[str, str]:
    """Sync every file, then say what there is; a folder without this isn't whole. -> SHA-256 by name"""
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors creates its files for the owner alone
        flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"format": FORMAT, "source": source, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    flush(folder / MANIFEST)
    flush(folder)
    return {name: facts["sha256"] for name, facts in files.items()}
