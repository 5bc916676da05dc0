"""Quantised bases: the numbers are those of bitsandbytes and of the gguf package, and gradients those over them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import tiny_llama
from decoders import gradients, make_decoder, make_rows, worst_error
from tunesmith.data.batches import Layout, make_step
from tunesmith.errors import InputError
from tunesmith.models.catalogue import gguf_file
from tunesmith.models.gguf_blocks import KINDS, Blocks
from tunesmith.models.int8 import Int8
from tunesmith.models.loading import load_base
from tunesmith.models.lora import add_new_adapter, linears, wrap
from tunesmith.models.merge import merge
from tunesmith.models.nf4 import Nf4
from tunesmith.models.peft_format import load_adapter, save_adapter
from tunesmith.models.quantise import describe, quantise
from tunesmith.models.quantised import QuantisedLinear, quantised_linears
from tunesmith.recipe import Adapter
from tunesmith.train.bodies import FusedBody, make_body
from tunesmith.train.estimate import choose_layout
from tunesmith.train.forward import ModuleBody
from tunesmith.train.loop import accumulate
from tunesmith.train.losses import sft
from tunesmith.tree.body import prepare

ROWS = make_rows(prompt=70)
TYPES = [gguf.GGMLQuantizationType[name] for name in KINDS]


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))


def numbers(stored) -> torch.Tensor:
    out = torch.full((stored.shape[0] * stored.shape[1],), torch.nan)
    stored.write(out)
    return out.view(stored.shape)


# Whole blocks, partial blocks, odd counts, more scales than one block of them, a matrix of zeros.
@pytest.mark.parametrize(
    ("shape", "spread"),
    [((64, 64), 0), ((1536, 576), 0), ((1536, 576), 1), ((24, 40), 0), ((5, 7), 0), ((3, 33), 0), ((300, 130), 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_nf4(shape, spread, dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator) * 0.05
    matrix = (matrix * 10 ** (spread * torch.randn(shape, generator=generator))).to(dtype)
    codes, state = functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    ours = Nf4(matrix)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.scales, state.state2.absmax)
    assert torch.equal(ours.mean, state.offset)
    state.dtype = torch.float32
    with torch.compiler.set_stance("force_eager"):  # it would compile what it does for odd shapes
        assert torch.equal(numbers(ours), functional.dequantize_4bit(codes, state))


def test_nf4_takes_about_half_a_byte_a_weight() -> None:
    for shape in ((576, 576), (192, 576), (1536, 576)):
        assert Nf4(torch.randn(shape)).bytes / (shape[0] * shape[1]) <= 0.53


def test_nf4_of_nothing_but_zeros() -> None:
    assert torch.equal(numbers(Nf4(torch.zeros(8, 40))), torch.zeros(8, 40))


def test_int8_is_off_by_half_a_step_of_its_row_at_most() -> None:
    matrix = torch.randn(40, 33) * torch.logspace(-3, 3, 40)[:, None]
    matrix[7] = 0
    ours = Int8(matrix)
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((numbers(ours) - matrix).abs() <= step * 0.5001).all()
    assert torch.equal(numbers(Int8(numbers(ours))), numbers(ours))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_a_files_blocks_are_the_numbers_gguf_says(kind) -> None:
    """Random bytes: every code, and scales of every size; those that are no finite number are made one."""
    random = np.random.default_rng(0)
    numbers_in, size = gguf.GGML_QUANT_SIZES[kind]
    rows = random.integers(0, 256, (1500, 512 // numbers_in, size), dtype=np.uint8)
    halves = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
    for at in halves.get(kind.name, []):
        scale = random.normal(0, 0.02, rows.shape[:2]).astype(np.float16)
        rows[..., at : at + 2] = scale[..., None].view(np.uint8).reshape(*scale.shape, 2)
    if kind.name in ("F32", "F16", "BF16"):
        values = random.normal(0, 1, (1500, 512)).astype(np.float32)
        rows = gguf.quantize(values, kind).view(np.uint8)
    rows = rows.reshape(1500, -1)
    plain = {"F32": np.float32, "F16": np.float16}
    expected = gguf.dequantize(rows.view(plain.get(kind.name, np.uint8)), kind)
    assert np.array_equal(numbers(Blocks(kind.name, rows)).numpy(), expected)


def adapted(model, adapter="a", kind="lora"):
    lora = wrap(model)
    add_new_adapter(lora, adapter, Adapter(rank=3, kind=kind), seed=0)
    torch.manual_seed(1)
    for _, parameter in lora.parameters(adapter):
        parameter.data = torch.randn_like(parameter, dtype=model.dtype) * 0.2
    lora.use(adapter)
    prepare(model)
    return lora


@torch.no_grad()
def dequantised(model):
    """The same numbers in plain linears."""
    for name, linear in linears(model).items():
        assert isinstance(linear, QuantisedLinear)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, linear.plain())
    return model


@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_over_a_quantised_linear_learns_as_over_its_numbers(name, how, kind) -> None:
    """Through the modules and, where the model has that shape, through the fused decoder."""
    found = {}
    for plain in (False, True):
        model = make_decoder(name)
        quantise(model, how, torch.float64)
        lora = adapted(dequantised(model) if plain else model, kind=kind)
        parameters = dict(lora.parameters("a"))
        for layout in (Layout(1000), Layout(90), Layout(1000, lanes=2)):
            for body in (ModuleBody(model, list(parameters.values())), make_body(model, lora, "a")):
                assert isinstance(body, FusedBody | ModuleBody)
                total, _ = accumulate(body, make_step(0, 1.0, ROWS, layout), sft)
                got = gradients(parameters)
                expected, wanted = found.setdefault("first", (total, got))
                assert total == pytest.approx(expected, rel=1e-10)
                assert worst_error(wanted, got) < 1e-9
    assert isinstance(body, FusedBody) is (name in ("llama", "qwen2", "phi3"))


def test_a_quantised_base_is_never_packed_into_copies() -> None:
    model = make_decoder("llama", torch.float32)
    quantise(model, "nf4", torch.float32)
    lora = adapted(model)
    fused = make_body(model, lora, "a")
    assert isinstance(fused, FusedBody)
    sizes = [linear.in_features * linear.out_features for linear in quantised_linears(model)[:7]]
    assert fused.dequantised_bytes == 4 * (sum(sizes) + max(sizes))
    choose_layout(fused, dict(lora.parameters("a")), ROWS, 10**12, share=True, pack=True)
    assert fused.head.panels is None
    fused.pack()
    assert all(stack._whole is None for layer in fused.decoder.layers for stack in layer.stacks)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_folder_loads_quantised_and_lets_go_of_its_file(quantize, tmp_path) -> None:
    folder = tiny_llama.save(tmp_path / "model")
    base, plain = load_base(str(folder), quantize=quantize), load_base(str(folder))
    assert (base.quantize, base.weights_hash) == (quantize, plain.weights_hash)
    kind = {"nf4": Nf4, "int8": Int8}[quantize]
    for name, linear in linears(plain.model).items():
        own = base.model.get_submodule(name)
        assert torch.equal(own.weight, numbers(kind(linear.weight)))
    assert torch.equal(base.model.get_input_embeddings().weight, plain.model.get_input_embeddings().weight)
    assert isinstance(base.model.get_output_embeddings(), nn.Linear)
    assert not any(weight.requires_grad for weight in base.model.parameters())
    assert "weights of its linears at" in describe(base.model, quantize)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["Q8_0", "F16", "F32"])
def test_keep_keeps_the_blocks_of_the_file(architecture, kind, tmp_path) -> None:
    """With llama.cpp's order of q and k undone, and in a model that keeps its weights transposed."""
    vocabulary = 41
    torch.manual_seed(0)
    if architecture == "llama":
        model = tiny_llama.llama(vocab_size=vocabulary)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    path = write_model(tmp_path / "m.gguf", model, architecture, quantise=kind)
    base, converted = load_base(str(path), quantize="keep"), load_base(str(path))
    assert len(quantised_linears(base.model)) == len(linears(converted.model))
    for name, linear in linears(converted.model).items():
        expected = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
        own = base.model.get_submodule(name)
        assert own.stored.kind is KINDS[kind]
        assert torch.equal(own.weight, expected)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(base.model(ids).logits, converted.model(ids).logits, rtol=0, atol=1e-5)


def test_keep_needs_a_file_of_blocks_it_knows(tmp_path) -> None:
    with pytest.raises(InputError, match=r"keep trains over the blocks of a \.gguf file"):
        load_base(str(tiny_llama.save(tmp_path / "model")), quantize="keep")
    with pytest.raises(InputError, match="there is no such file"):
        gguf_file(str(tmp_path / "none.gguf"))
    path = write_model(tmp_path / "m.gguf", tiny_llama.llama(vocab_size=41), "llama", quantise="Q5_1")
    with pytest.raises(InputError, match=r"is stored as Q5_1, which quantize keep can't train over \(F32, "):
        load_base(str(path), quantize="keep")


def test_an_adapter_names_what_it_was_trained_over_and_is_refused_elsewhere(tmp_path) -> None:
    folder = tiny_llama.save(tmp_path / "model")
    base = load_base(str(folder), quantize="nf4")
    save_adapter(adapted(base.model), "a", tmp_path / "adapter", Adapter(rank=3), base.name)
    load_adapter(wrap(load_base(str(folder), quantize="nf4").model), "b", tmp_path / "adapter")
    for other, said in ((None, "not quantised"), ("int8", "in int8")):
        with pytest.raises(InputError, match=f"trained over its base in nf4, and this base is {said}"):
            load_adapter(wrap(load_base(str(folder), quantize=other).model), "b", tmp_path / "adapter")
    save_adapter(adapted(load_base(str(folder)).model), "a", tmp_path / "plain", Adapter(rank=3), base.name)
    load_adapter(wrap(load_base(str(folder), quantize="nf4").model), "b", tmp_path / "plain")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_gives_plain_linears_that_say_the_same(name) -> None:
    model = make_decoder(name, torch.float32)
    quantise(model, "nf4", torch.float32)
    lora = adapted(model)
    ids = torch.arange(20)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids).logits
        merged = merge(lora, "a")
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == make_decoder(name).state_dict().keys()
