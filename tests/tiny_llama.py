"""A model folder of a few kilobytes, for tests of files rather than of mathematics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """257 tokens: the end of text, then the bytes."""
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0} | SIZES | changes
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def save(folder: Path, **changes: Any) -> Path:
    llama(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
