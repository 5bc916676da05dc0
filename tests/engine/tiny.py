"""Tiny random decoders of many families, and a renderer for them: letters for tokens, token 1 ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tunesmith.engine.engine import Engine
from tunesmith.models.lora import LoraModel, wrap

VOCABULARY, CONTEXT, STOP = 97, 256, 1
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": STOP,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "mistral-window": MistralConfig(**COMMON, sliding_window=9),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=16, sliding_window=9, attn_logit_softcapping=5.0, final_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=9),
    "phi3": Phi3Config(**COMMON),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT, bos_token_id=2, eos_token_id=STOP
    ),
    "granite": GraniteConfig(**COMMON, logits_scaling=4.0, attention_multiplier=0.3, residual_multiplier=0.5),
    "cohere2": Cohere2Config(**COMMON, logit_scale=0.25, sliding_window=9),
}


def build(family: str, **changes) -> PreTrainedModel:
    """A fresh model, random but the same each time; weights large enough that answers vary."""
    torch.manual_seed(7)
    config = deepcopy(CONFIGS[family])
    config.update(changes)
    config.initializer_range = 0.25
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


@cache
def rival(family: str) -> PreTrainedModel:
    """The same weights, left to transformers."""
    return build(family)


class LetterRenderer:
    """Token ids as single characters; a message is its content's characters."""

    vocab_size = VOCABULARY

    def __init__(self, stop: int = STOP) -> None:
        self.stop_ids = frozenset({stop})

    def prompt_ids(self, messages: Sequence, tools: Sequence = ()) -> list[int]:
        return [2, *(ord(c) - 32 for message in messages for c in message["content"])]

    def completion_prompt_ids(self, prompt: str) -> list[int]:
        return [2, *(ord(c) - 32 for c in prompt)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(32 + i) for i in ids if i > 2)


def tiny_engine(family: str = "llama", **settings) -> Engine:
    return engine_over(wrap(build(family)), **settings)


def engine_over(lora: LoraModel, **settings) -> Engine:
    return Engine.over(lora, LetterRenderer(), context_length=CONTEXT, **settings)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> tuple[list[int], list[float]]:
    """transformers' own greedy answer, without a cache, and its log-probabilities."""
    ids, logprobs = list(prompt), []
    for _ in range(max_tokens):
        scores = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0, -1].float(), -1)
        token = int(scores.argmax())
        ids.append(token)
        logprobs.append(float(scores[token]))
        if token == STOP:
            break
    return ids[len(prompt) :], logprobs
