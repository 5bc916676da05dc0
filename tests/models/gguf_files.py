"""Write GGUF files as llama.cpp's converter does, so that reading them back can be compared with the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOKENS = ["<|end|>", *(chr(letter) for letter in range(ord("a"), ord("z") + 1)), "ab", "Ġ", *"0123456789", "12"]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, *([1] * (len(TOKENS) - 1))],
    "tokenizer.ggml.merges": ["a b", "1 2"],
    "tokenizer.ggml.eos_token_id": 0,
}


def write_model(path: Path, model: PreTrainedModel, architecture: str, **changes: Any) -> Path:
    """A model as a GGUF file. `changes` replaces metadata keys (dots written as __); None leaves a key out.

    `quantise` names the blocks that matrices are stored in, `tensors` holds more of them.
    """
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {**_about(model, architecture), **TOKENIZER}
    metadata |= {key.replace("__", "."): value for key, value in changes.items() if key not in ("tensors", "quantise")}
    for key, value in metadata.items():
        add(writer, key, value)
    kind = gguf.GGMLQuantizationType[changes.get("quantise", "F32")]
    for name, weight in tensors(model, architecture).items():
        if weight.ndim == 2:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    for name, weight in changes.get("tensors", {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        kinds[type(value)](key, value)


def _about(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    config = model.config
    facts = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "gpt2":
        facts |= {"feed_forward_length": 4 * config.hidden_size, "attention.layer_norm_epsilon": 1e-5}
    else:
        facts |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "attention.key_length": getattr(config, "head_dim", None),
        }
    return {f"{architecture}.{key}": value for key, value in facts.items()}


def tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    names = GPT2_NAMES if architecture == "gpt2" else LLAMA_NAMES
    written = {}
    tied = model.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        stem, _, kind = name.rpartition(".")
        short = stem
        for prefix in ("model.layers.", "transformer.h."):
            if stem.startswith(prefix):
                layer, _, short = stem.removeprefix(prefix).partition(".")
        place = names[short] if short == stem else f"blk.{layer}.{names[short]}"
        values = weight.numpy()
        if architecture == "llama" and place.endswith(("attn_q", "attn_k")):
            values = _permute(values, model.config, place)
        if architecture == "gpt2" and kind == "weight" and values.ndim == 2 and place.startswith("blk."):
            values = values.T
        written[f"{place}.{kind}"] = np.ascontiguousarray(values)
    return written


def _permute(values: np.ndarray, config: Any, place: str) -> np.ndarray:
    """llama.cpp's LlamaModel.permute: the two halves of each head interleaved."""
    heads = config.num_attention_heads if place.endswith("attn_q") else config.num_key_value_heads
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
