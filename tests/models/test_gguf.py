"""A GGUF file read back is the model it was written from, or is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import TOKENIZER, TOKENS, add, write_model
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tiny_llama
from tunesmith.chat.renderer import Renderer
from tunesmith.errors import InputError
from tunesmith.models import conversion
from tunesmith.models.catalogue import resolve
from tunesmith.models.conversion import narrowest
from tunesmith.models.gguf import GGUFFile
from tunesmith.models.gguf_tokenizer import read_tokenizer
from tunesmith.models.loading import load_base

SIZES = {"vocab_size": len(TOKENS)} | tiny_llama.SIZES
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))


MODELS = {
    "llama": lambda: llama(),
    "llama-untied": lambda: llama(tie_word_embeddings=True),
    "llama-wide-heads": lambda: llama(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(TOKENS), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    ),
}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))


def random(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight moved off its initial value, so that a norm or bias in the wrong place shows."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_as_it_was(name, tmp_path) -> None:
    model = random(MODELS[name]())
    loaded = load_base(str(write_model(tmp_path / "m.gguf", model, name.partition("-")[0])))
    ids = torch.arange(20)[None] % len(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert loaded.context_length == 64
    assert loaded.stop_ids == {0}


def test_llama_31_rotation_is_recognised(tmp_path) -> None:
    model = random(llama(rope_parameters=LLAMA3_ROPE, max_position_embeddings=131072))
    divisors = 1 / (model.model.rotary_emb.inv_freq.numpy() * 500_000.0 ** (np.arange(0, 8, 2) / 8))
    path = write_model(tmp_path / "m.gguf", model, "llama", tensors={"rope_freqs.weight": divisors.astype(np.float32)})
    loaded = load_base(str(path)).model
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    other = write_model(
        tmp_path / "o.gguf", model, "llama", tensors={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}
    )
    with pytest.raises(InputError, match="not those of Llama"):
        load_base(str(other))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling of type yarn"),
        ({"llama__rope__dimension_count": 4}, "a part of each head"),
        ({"llama__attention__head_count": 0}, "describes no model|has shape"),
        ({"llama__embedding_length": "many"}, "describes no model"),
        ({"llama__block_count": None}, "lacks llama.block_count"),
        ({"llama__block_count": 3}, "lacks the weight model.layers.2"),
        ({"llama__embedding_length": 64}, "has shape"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}}, "blk.0.attn_sinks.weight has no place"),
        ({"tokenizer__ggml__pre": "unheard-of"}, "pre-tokenizer unheard-of"),
        ({"tokenizer__ggml__pre": None}, "pre-tokenizer None"),
        ({"tokenizer__ggml__model": "rwkv"}, "tokenizers of kind rwkv"),
        ({"tokenizer__ggml__model": "llama"}, "no scores"),
        ({"tokenizer__ggml__tokens": None}, "no vocabulary"),
        ({"tokenizer__ggml__merges": ["a b", "a c"]}, 'merge "a c"'),
    ],
)
def test_what_cannot_be_rebuilt_exactly_is_refused(changes, reason, tmp_path) -> None:
    path = write_model(tmp_path / "m.gguf", llama(), "llama", **changes)
    with pytest.raises(InputError, match=reason) as caught:
        resolve(str(path))
    assert str(path) in str(caught.value)
    assert [p.name for p in (tmp_path / "home" / "models").iterdir() if not p.name.startswith(".")] == []
    assert not list((tmp_path / "home" / "models").glob(".partial*"))


def test_an_unknown_architecture_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="architecture falcon is not read"):
        resolve(str(write_model(tmp_path / "m.gguf", llama(), "falcon")))


@pytest.mark.parametrize("damage", ["empty", "half", "text", "header"])
def test_a_damaged_file_is_a_sentence(damage, tmp_path) -> None:
    path = write_model(tmp_path / "m.gguf", llama(), "llama")
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "half": whole[: len(whole) // 2], "text": b"hello" * 99, "header": whole[:100]}[damage]
    )
    with pytest.raises(InputError, match="not a whole GGUF file"):
        resolve(str(path))


def test_a_file_is_converted_once_and_found_again_by_its_content(tmp_path, capsys) -> None:
    first = write_model(tmp_path / "a.gguf", llama(), "llama")
    one = resolve(str(first))
    assert "converting a.gguf" in capsys.readouterr().err
    assert resolve(str(first)) == one
    assert "converting" not in capsys.readouterr().err
    changed = first.read_bytes()[:-4] + b"\0\0\0\1"
    first.write_bytes(changed)
    assert resolve(str(first)).folder != one.folder


def test_values_are_stored_in_the_smallest_type_that_is_exact(tmp_path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.randn(100).to(dtype).float()
        assert narrowest(values).dtype == dtype
        assert torch.equal(narrowest(values).float(), values)
    assert narrowest(torch.randn(100)).dtype == torch.float32
    path = write_model(tmp_path / "m.gguf", random(llama()).half().float(), "llama")
    weights = load_file(resolve(str(path)).folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(conversion, "SHARD_BYTES", 20_000)
    model = random(llama())
    loaded = load_base(str(write_model(tmp_path / "m.gguf", model, "llama")))
    assert len(list(loaded.folder.glob("model-*.safetensors"))) > 2
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)


def tokenizer_of(tmp_path: Path, **changes) -> AutoTokenizer:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for key, value in (TOKENIZER | {key.replace("__", "."): value for key, value in changes.items()}).items():
        add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read_tokenizer(GGUFFile(tmp_path / "t.gguf")).save_pretrained(tmp_path / "t")
    return AutoTokenizer.from_pretrained(tmp_path / "t")


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("gpt-2", ["ab", "12"]), ("smollm", ["ab", "1", "2"]), ("qwen2", ["ab", "1", "2"]), ("llama-bpe", ["ab", "12"])],
)
def test_the_kind_of_pre_tokenizer_decides_what_merges(kind, pieces, tmp_path) -> None:
    tokenizer = tokenizer_of(tmp_path, tokenizer__ggml__pre=kind, tokenizer__ggml__add_bos_token=False)
    assert tokenizer.tokenize("ab12") == pieces
    assert tokenizer.decode(tokenizer("ab 12")["input_ids"]) == "ab 12"


def test_special_tokens_are_whole_and_user_defined_ones_are_kept(tmp_path) -> None:
    kinds = [3, *([1] * (len(TOKENS) - 1))]
    kinds[TOKENS.index("ab")] = 4
    tokenizer = tokenizer_of(tmp_path, tokenizer__ggml__token_type=kinds)
    ids = tokenizer("ab<|end|>")["input_ids"]
    assert ids == [TOKENS.index("ab"), 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("kind", "stated", "added"),
    [("gpt-2", None, False), ("llama-bpe", None, True), ("gpt-2", True, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_where_the_file_or_its_kind_says_so(kind, stated, added, tmp_path) -> None:
    tokenizer = tokenizer_of(
        tmp_path, tokenizer__ggml__pre=kind, tokenizer__ggml__add_bos_token=stated, tokenizer__ggml__bos_token_id=0
    )
    assert (tokenizer("ab")["input_ids"][0] == 0) is added
    assert (Renderer.from_tokenizer(tokenizer).completion_prompt_ids("ab")[0] == 0) is added


def test_sentencepiece_vocabularies_merge_by_score(tmp_path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "ab", "bc", "▁a"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    kinds = [2, 3, 3, *([6] * 256), *([1] * 7)]
    tokenizer = tokenizer_of(
        tmp_path,
        tokenizer__ggml__model="llama",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__scores=scores,
        tokenizer__ggml__token_type=kinds,
        tokenizer__ggml__bos_token_id=1,
        tokenizer__ggml__eos_token_id=2,
    )
    assert tokenizer.tokenize("abc") == ["▁a", "bc"]  # bc (-1) merges before ab (-2), then ▁a
    assert tokenizer("é", add_special_tokens=False)["input_ids"] == [259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer("a")["input_ids"][0] == 1
    assert tokenizer.decode(tokenizer("abc é")["input_ids"], skip_special_tokens=True) == "abc é"


@pytest.mark.base
def test_the_embedded_bases_tokenizer(base) -> None:
    """Ids as the hub's own tokenizer.json of SmolLM2-135M-Instruct gives them: digits stand alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.tokenize("In 2024, it's 3.14") == [
        *("In", "Ġ", "2", "0", "2", "4", ",", "Ġit", "'s", "Ġ", "3", ".", "1", "4")
    ]
    assert tokenizer("<|im_start|>user\n")["input_ids"] == [1, 4093, 198]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    manifest = json.loads((base / "tunesmith.json").read_text())
    assert manifest["source"]["sha256"].startswith("b179c952")
