"""Tiny random decoders of the architectures in use, rows that share prefixes, and the one-by-one computation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import transformers as tf
from torch import Tensor, nn

from tunesmith.tree.body import run_body
from tunesmith.tree.heads import head_of
from tunesmith.tree.layout import build_tree
from tunesmith.tree.oracle import DenseContext
from tunesmith.types import TokenizedExample

logging.getLogger("transformers").setLevel(logging.ERROR)
VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
DECODERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=10)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, sliding_window=6)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**GEMMA, attn_logit_softcapping=0.7, final_logit_softcapping=0.9)
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
        )
    ),
}


def make_decoder(name: str, dtype: torch.dtype = torch.float64) -> tf.PreTrainedModel:
    """Weights large enough for attention to be far from uniform. In float64 the norms are too, as elsewhere."""
    torch.manual_seed(0)
    model = DECODERS[name]().to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                _norm_in_double(module)
    return model


def _norm_in_double(module: nn.Module) -> None:
    """transformers computes RMSNorm in float32 whatever it is given; an oracle for 1e-9 can't."""
    eps = getattr(module, "variance_epsilon", None) or module.eps
    plus_one = type(module).__name__.startswith("Gemma")

    def forward(x: Tensor) -> Tensor:
        weight = module.weight + 1 if plus_one else module.weight
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    module.forward = forward


def example(ids: Sequence[int], supervised: int, name: str = "row", weight: float = 1.0) -> TokenizedExample:
    """The last `supervised` ids are trained."""
    weights = np.zeros(len(ids), dtype=np.float32)
    if supervised:
        weights[-supervised:] = weight
    return TokenizedExample(name, np.array(ids, dtype=np.int32), weights)


def make_rows(seed: int = 0, documents: int = 3, questions: int = 3, prompt: int = 9) -> list[TokenizedExample]:
    """A prompt, documents behind it, questions behind those, one duplicate and one row that shares nothing."""
    random = np.random.default_rng(seed)
    shared = random.integers(3, VOCABULARY, prompt).tolist()
    rows = []
    for _ in range(documents):
        document = shared + random.integers(3, VOCABULARY, random.integers(0, 6)).tolist()
        for _ in range(questions):
            ids = document + random.integers(3, VOCABULARY, random.integers(2, 9)).tolist()
            rows.append(example(ids, int(random.integers(1, 3)), f"row {len(rows)}", float(random.integers(1, 3))))
    return [*rows, rows[0], example(random.integers(3, VOCABULARY, 11).tolist(), 4, "stranger")]


def one_by_one(model: tf.PreTrainedModel, rows: Sequence[TokenizedExample]) -> Tensor:
    """The weighted negative log-likelihood, each row by itself, by ordinary mathematics."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        tree = build_tree([replace(row, weights=np.zeros_like(row.weights))])  # all of its tokens
        hidden = run_body(
            model, torch.as_tensor(tree.input_ids), torch.as_tensor(tree.position_ids), DenseContext(tree)
        )
        logprobs = head_of(model).logits(hidden).log_softmax(-1)
        targets = torch.as_tensor(row.input_ids[1:], dtype=torch.long)
        picked = logprobs[:-1].gather(1, targets[:, None])[:, 0]
        total = total - (picked.double() * torch.as_tensor(row.weights[1:])).sum()
    return total


def gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of every gradient, zero where there is none, and the parameters cleared for the next computation."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def worst_error(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient; one that is zero but for rounding is measured by the whole gradient."""
    whole = float(torch.stack([g.double().norm() for g in expected.values()]).norm())
    return max(
        float((actual[name] - g).double().norm()) / max(float(g.double().norm()), 1e-3 * whole)
        for name, g in expected.items()
    )
