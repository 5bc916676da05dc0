"""Adapters pass between tunesmith and PEFT in both directions with the same logits; what does not fit is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import tiny_llama as tiny
from tunesmith.errors import InputError
from tunesmith.models.loading import load_base
from tunesmith.models.lora import LoraModel, add_new_adapter, wrap
from tunesmith.models.merge import merge
from tunesmith.models.peft_format import check_adapter, load_adapter, read_config, save_adapter
from tunesmith.recipe import Adapter

IDS = torch.arange(12)[None] % 60


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()


def tied() -> PreTrainedModel:
    return tiny.llama(tie_word_embeddings=True)


MODELS = {"llama": tiny.llama, "gpt2": gpt2, "tied": tied}
ENDS = ("embed_tokens", "wte", "lm_head")  # as a list of names


def trained(model: PreTrainedModel, section: Adapter, name: str = "t") -> LoraModel:
    lora = wrap(model)
    add_new_adapter(lora, name, section, seed=0)
    generator = torch.Generator().manual_seed(1)
    for key, weight in lora.parameters(name):
        noise = 0.1 * torch.randn(weight.shape, generator=generator)
        weight.data = weight * (1 + noise) if "magnitude" in key else noise
    return lora


@torch.no_grad()
def logits(lora: LoraModel, adapter: str | None) -> torch.Tensor:
    lora.use(adapter)
    return lora.model(IDS).logits


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "section",
    [
        Adapter(rank=4, alpha=8),
        Adapter(rank=3, alpha=10, rslora=True),
        Adapter(rank=4, alpha=7, target_modules=("q_proj", "v_proj", "c_attn")),
        Adapter(rank=2, target_modules=r".*\.1\..*(up_proj|c_fc)"),
        Adapter(rank=4, alpha=8, kind="dora"),
        Adapter(rank=3, alpha=10, kind="dora", rslora=True, target_modules=(*ENDS, "v_proj", "c_attn")),
        Adapter(rank=4, target_modules=("embed_tokens", "wte")),
        Adapter(rank=4, target_modules=("lm_head",)),
        Adapter(rank=4, rslora=True, target_modules=(*ENDS, "q_proj", "c_proj")),
        Adapter(rank=4, target_modules=r".*(embed_tokens|wte|lm_head|o_proj|c_attn)"),
    ],
    ids=[
        "all-linear",
        "rslora",
        "names",
        "regex",
        "dora",
        "dora-rslora-ends",
        "embedding",
        "head",
        "ends",
        "ends-regex",
    ],
)
def test_peft_reads_what_tunesmith_writes(kind, section, tmp_path) -> None:
    model = MODELS[kind]()
    reference = copy.deepcopy(model)
    lora = trained(model, section)
    save_adapter(lora, "t", tmp_path / "a", section, "the/base", "abc")
    ours, plain = logits(lora, "t"), logits(lora, None)
    peft_model = PeftModel.from_pretrained(reference, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(peft_model(IDS).logits, ours, rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-2
    saved = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert saved == {name for name, _ in lora.parameters("t")}
    theirs = peft_model.peft_config["default"]
    assert (theirs.base_model_name_or_path, theirs.revision, theirs.r) == ("the/base", "abc", section.rank)
    assert (theirs.use_dora, theirs.use_rslora) == (section.kind == "dora", section.rslora)
    adapted = {name for name, module in peft_model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {name for name, layer in lora.everywhere.items() if "t" in layer.adapters}
    merged = merge(lora, "t")
    assert not any("base" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, ours, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj", "c_fc"]},
        {"r": 4, "target_modules": r".*\.0\..*(q_proj|c_attn)"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "c_attn": 2},
            "alpha_pattern": {r"1\.mlp\.up_proj": 3, r"1\.mlp\.c_fc": 3},
        },
        {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 8, "use_dora": True, "use_rslora": True, "target_modules": [*ENDS, "up_proj", "c_fc"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "wte", "k_proj", "c_attn"]},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": r".*(lm_head|wte|embed_tokens|o_proj)"},
        {"r": 4, "target_modules": "all-linear", "trainable_token_indices": [5, 9]},
        {
            "r": 4,
            "use_dora": True,
            "target_modules": ["q_proj", "c_attn"],
            "trainable_token_indices": {"lm_head": [5], "embed_tokens": [5], "wte": [5]},
        },
    ],
    ids=[
        "all-linear",
        "rslora",
        "regex",
        "patterns",
        "dora",
        "dora-rslora-ends",
        "embedding",
        "ends-regex",
        "tokens",
        "tokens-of-both-ends",
    ],
)
def test_tunesmith_reads_what_peft_writes_and_writes_it_back(kind, config, tmp_path) -> None:
    model = MODELS[kind]()
    if isinstance(config.get("trainable_token_indices"), dict):  # PEFT takes no name that is not there
        tokens = {k: v for k, v in config["trainable_token_indices"].items() if (k == "wte") == (kind == "gpt2")}
        config = config | {"trainable_token_indices": tokens | {"lm_head": [5]}}
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    for name, weight in theirs.named_parameters():
        noise = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
        if "lora_" in name or "tokens_delta" in name:
            weight.data = weight * (1 + noise) if "magnitude" in name else noise
    theirs.save_pretrained(tmp_path / "theirs")
    lora = wrap(copy.deepcopy(model))
    size = check_adapter(lora, tmp_path / "theirs")
    facts = load_adapter(lora, "x", tmp_path / "theirs")
    ranks = [layer.adapters["x"].a.shape[0] for layer in lora.layers.values() if "x" in layer.adapters]
    held = sum(weight.nbytes for _, weight in lora.parameters("x"))
    assert (size.rank, size.inner + size.ends) == (max(ranks, default=0), held), "the header says another size"
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(logits(lora, "x"), expected, rtol=0, atol=1e-5)
    assert facts.rank == 4
    section = Adapter(rank=4, rslora=bool(config.get("use_rslora")))
    save_adapter(lora, "x", tmp_path / "back", section, "b")
    with torch.no_grad():
        again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "back")(IDS).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "tied"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_are_pefts(kind, use_dora, tmp_path) -> None:
    """The length under a magnitude is a constant, and tied ends learn apart."""
    model = MODELS[kind]()
    config = LoraConfig(task_type="CAUSAL_LM", r=3, use_dora=use_dora, target_modules=r".*(proj|lm_head|embed_tokens)")
    theirs = get_peft_model(copy.deepcopy(model), config)
    for _, weight in theirs.named_parameters():
        if weight.requires_grad:
            weight.data += 0.1
    theirs.save_pretrained(tmp_path)
    theirs(IDS, labels=IDS).loss.backward()
    lora = wrap(model)
    load_adapter(lora, "x", tmp_path)
    lora.use("x")
    model(IDS, labels=IDS).loss.backward()
    expected = dict(theirs.named_parameters())
    ours = dict(lora.parameters("x"))
    for name, weight in ours.items():
        twin = name.removesuffix(".weight") + ".default" + (".weight" if name.endswith(("weight", "vector")) else "")
        torch.testing.assert_close(weight.grad, expected[twin].grad, rtol=1e-4, atol=1e-6, msg=name)
    assert len(ours) == sum(weight.requires_grad for weight in expected.values())


def test_target_modules_are_short_names_where_they_say_exactly_that(tmp_path) -> None:
    for targets, written in (
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (r".*0\.self_attn\.q_proj", ["model.layers.0.self_attn.q_proj"]),
    ):
        section = Adapter(rank=2, target_modules=targets)
        save_adapter(trained(tiny.llama(), section), "t", tmp_path, section, "b")
        assert read_config(tmp_path)["target_modules"] == written


def test_the_same_adapter_is_the_same_bytes(tmp_path) -> None:
    for name in ("one", "two"):
        save_adapter(trained(tiny.llama(), Adapter(rank=4)), "t", tmp_path / name, Adapter(rank=4), "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.fixture
def adapter(tmp_path) -> Path:
    save_adapter(trained(tiny.llama(), Adapter(rank=4)), "t", tmp_path / "a", Adapter(rank=4), "b")
    return tmp_path / "a"


def refused(folder: Path, reason: str, model: PreTrainedModel | None = None) -> None:
    lora = wrap(model or tiny.llama())
    with pytest.raises(InputError, match=reason) as caught:
        load_adapter(lora, "x", folder)
    assert "\n" not in str(caught.value)
    assert not any(layer.adapters for layer in lora.layers.values()), "a refused adapter must leave nothing behind"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("r", 0),
        ("lora_alpha", None),
        ("trainable_token_indices", [1]),
        ("r", 8),
    ],
)
def test_what_cannot_be_applied_exactly_is_refused(field, value, adapter) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    refused(adapter, {"peft_type": "IA3", "r": "r is 0|does not fit"}.get(field, field))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.clear(), "empty"),
        (lambda weights: weights.pop(next(iter(weights))), "only one of lora_A and lora_B"),
        (lambda weights: weights.update({"base_model.model.lm_head.weight": torch.ones(2)}), "no LoRA weight"),
        (lambda weights: next(iter(weights.values())).fill_(torch.nan), "not finite"),
        (
            lambda weights: weights.update(
                {f"base_model.model.model.norm.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
            ),
            "norm, which is no linear",
        ),
        (
            lambda weights: weights.update(
                {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(257, 32)}
            ),
            "embed_tokens.base_layer.weight, which is no LoRA weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, reason, adapter) -> None:
    """trl#4416, peft#2892: an empty adapter was saved, and served."""
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")
    refused(adapter, reason)


def test_an_adapter_of_another_base_is_refused(adapter) -> None:
    refused(adapter, "does not fit this base", tiny.llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=3))
    refused(adapter, "no linear layer of this base", gpt2())


def test_damaged_and_missing_files_are_sentences(adapter, tmp_path) -> None:
    refused(tmp_path, "holds no adapter_config.json")
    (adapter / "adapter_model.safetensors").write_bytes(b"hello")
    refused(adapter, "damaged")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "holds no adapter_model.safetensors")
    (adapter / "adapter_model.bin").write_bytes(b"")
    refused(adapter, "pickled")
    (adapter / "adapter_config.json").write_text("{")
    refused(adapter, "cannot be read")
    (adapter / "adapter_config.json").write_text("[]")
    refused(adapter, "of type None")


def test_a_folder_that_cannot_be_written_is_the_systems_own_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        save_adapter(trained(tiny.llama(), Adapter()), "t", tmp_path / "file" / "a", Adapter(), "b")


@pytest.mark.base
def test_peft_finds_the_same_logits_on_the_real_base(base, tmp_path) -> None:
    section = Adapter(rank=16)
    model = load_base(str(base)).model
    reference = copy.deepcopy(model)
    lora = wrap(model)
    add_new_adapter(lora, "t", section, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in lora.parameters("t"):
        if "lora_B" in name:
            weight.data = 0.01 * torch.randn(weight.shape, generator=generator)
    save_adapter(lora, "t", tmp_path, section, "smollm2-135m-instruct")
    ours, plain = logits(lora, "t"), logits(lora, None)
    theirs = PeftModel.from_pretrained(reference, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours, rtol=1e-4, atol=1e-3)
    assert (ours - plain).abs().max() > 0.1
