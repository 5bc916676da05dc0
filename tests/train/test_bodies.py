"""The fused decoder against the model's own modules."""

import gc
import weakref

import pytest
import torch
import transformers as tf

from decoders import DECODERS, SIZES, gradients, make_decoder, make_rows, one_by_one, worst_error
from tunesmith.data.batches import Layout, make_step
from tunesmith.models.lora import add_new_adapter, add_token_rows, wrap
from tunesmith.recipe import Adapter
from tunesmith.train import gradient
from tunesmith.train.bodies import FusedBody, make_body
from tunesmith.train.estimate import choose_layout
from tunesmith.train.forward import ModuleBody
from tunesmith.train.gradient import accumulate
from tunesmith.train.losses import sft
from tunesmith.tree.body import prepare
from tunesmith.tree.layout import inputs

ROWS = make_rows(prompt=70)
FUSED = ("llama", "qwen2", "qwen3", "mistral", "phi3")
TARGETS = {
    "all": "all-linear",
    "some": ("q_proj", "v_proj", "up_proj", "qkv_proj", "down_proj"),
    "upper layer": r".*layers\.1\..*(o_proj|up_proj|gate_up_proj)",
    "ends": r"lm_head|.*embed_tokens|.*layers\.1\..*up_proj",
}


def adapted(model, target_modules="all-linear", **keys):
    lora = wrap(model)
    add_new_adapter(lora, "a", Adapter(rank=3, target_modules=target_modules, **keys), seed=0)
    torch.manual_seed(1)
    for _, parameter in lora.parameters("a"):
        parameter.data = torch.randn_like(parameter, dtype=model.dtype) * 0.2
    lora.use("a")
    prepare(model)
    return lora


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_fused_decoder_gives_the_gradients_of_the_modules(name, targets, kind):
    model = make_decoder(name)
    for n, parameter in model.named_parameters():
        if n.endswith(("bias", "norm.weight", "layernorm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    lora = adapted(model, TARGETS[targets], kind=kind)
    parameters, fused = dict(lora.parameters("a")), make_body(model, lora, "a")
    assert isinstance(fused, FusedBody)
    for layout in (Layout(1000), Layout(90), Layout(1000, share=False)):
        step = make_step(0, 1.0, ROWS, layout)
        expected, _ = accumulate(ModuleBody(model), step, sft)
        wanted = gradients(parameters)
        for _ in range(2):  # the second time in used buffers
            total, _ = accumulate(fused, step, sft)
            assert total == pytest.approx(expected, rel=1e-10)
            assert worst_error(wanted, gradients(parameters)) < 1e-9


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_adapters_own_rows_get_the_gradients_of_plain_mathematics(name, packed):
    model = make_decoder(name, torch.float32 if packed else torch.float64)
    lora = wrap(model)
    add_new_adapter(lora, "a", Adapter(rank=3), seed=0)
    add_token_rows(lora, "a", [ROWS[0].input_ids[1], ROWS[0].input_ids[-1], 60])
    torch.manual_seed(1)
    for _, parameter in lora.parameters("a"):
        parameter.data = torch.randn_like(parameter, dtype=model.dtype) * 0.2
    lora.use("a")
    prepare(model)
    parameters, body = dict(lora.parameters("a")), make_body(model, lora, "a")
    assert isinstance(body, FusedBody) == (name != "gemma2")
    if packed and isinstance(body, FusedBody):
        body.pack()
    total = one_by_one(model, ROWS)
    total.backward()
    wanted = gradients(parameters)
    step = make_step(0, 1.0, ROWS, Layout(90))
    found, _ = accumulate(body, step, sft)
    assert found == pytest.approx(float(total), rel=1e-5)
    given = {n: g * step.weight for n, g in gradients(parameters).items()}
    assert worst_error(wanted, given) < (2e-4 if packed else 1e-9)


def test_float32_agrees_too():
    model = make_decoder("qwen3", torch.float32)
    lora = adapted(model)
    parameters, fused = dict(lora.parameters("a")), make_body(model, lora, "a")
    step = make_step(0, 1.0, ROWS, Layout(90))
    expected, _ = accumulate(ModuleBody(model), step, sft)
    wanted = gradients(parameters)
    total, _ = accumulate(fused, step, sft)
    assert total == pytest.approx(expected, rel=1e-5)
    assert worst_error(wanted, gradients(parameters)) < 1e-4


@pytest.mark.parametrize("name", sorted(set(DECODERS) - set(FUSED)))
def test_other_shapes_go_through_their_own_modules(name):
    model = make_decoder(name, torch.float32)
    lora = adapted(model)
    assert isinstance(make_body(model, lora, "a"), ModuleBody)


def test_a_model_of_that_shape_but_other_numbers_is_told_apart():
    model = tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES, residual_multiplier=0.5)).eval()
    lora = adapted(model)
    assert isinstance(make_body(model, lora, "a"), ModuleBody)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_goes_through_the_modules(kind):
    model = make_decoder("llama", torch.float32)
    lora = adapted(model, kind=kind, dropout=0.1)
    assert isinstance(make_body(model, lora, "a"), ModuleBody)


@pytest.mark.parametrize(("targets", "layers"), [("all", 2), ("upper layer", 1), ("ends", 2)])
def test_layers_below_the_lowest_that_learns_keep_nothing(targets, layers):
    model = make_decoder("llama")
    fused = make_body(model, adapted(model, TARGETS[targets]), "a")
    accumulate(fused, make_step(0, 1.0, ROWS, Layout(1000)), sft)
    (slabs,) = fused.decoder.slabs.free
    assert {len(slab) for slab in slabs} == {layers}
    assert sum(slab.nbytes for slab in slabs) == slabs[0].shape[1] * fused.decoder.bytes_per_token


def test_evaluation_keeps_nothing():
    model = make_decoder("llama")
    lora = adapted(model)
    fused, step = make_body(model, lora, "a"), make_step(0, 1.0, ROWS, Layout(90))
    with torch.no_grad():
        total, _ = accumulate(fused, step, sft, backward=False)
    assert total == pytest.approx(accumulate(ModuleBody(model), step, sft, backward=False)[0], rel=1e-10)
    assert not fused.decoder.slabs.free


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_packed_weights_compute_the_same(name, targets, kind):
    """As near to double precision as the modules are in single, or as weights are that were rounded otherwise: how near
    that is, is the model's own affair (1e-6 to 1e-4 here), so it is measured and not assumed."""
    model, exact = make_decoder(name, torch.float32), make_decoder(name)
    exact.load_state_dict(model.state_dict())
    lora, exact_lora = (adapted(each, TARGETS[targets], kind=kind) for each in (model, exact))
    parameters, exact_parameters = dict(lora.parameters("a")), dict(exact_lora.parameters("a"))
    for n, parameter in exact_parameters.items():
        parameter.data.copy_(parameters[n].data)
    fused = make_body(model, lora, "a")
    fused.pack()
    for layout in (Layout(1000), Layout(90), Layout(1000, lanes=2)):
        step = make_step(0, 1.0, ROWS, layout)
        expected, _ = accumulate(ModuleBody(exact), step, sft)
        wanted = gradients(exact_parameters)
        accumulate(ModuleBody(model), step, sft)
        rounded = worst_error(wanted, gradients(parameters))
        allowed = 5 * max(rounded, *(error_of_rounding(exact, exact_parameters, step, wanted, n) for n in range(4)))
        total, _ = accumulate(fused, step, sft)
        assert total == pytest.approx(expected, rel=1e-5)
        assert worst_error(wanted, gradients(parameters)) < allowed


@pytest.mark.parametrize("layout", [Layout(1000), Layout(90), Layout(90, lanes=2), Layout(1000, share=False)])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_that_has_changed_is_laid_out_again(layout, kind):
    model = make_decoder("llama", torch.float32)
    lora = adapted(model, kind=kind)
    parameters, fused, step = dict(lora.parameters("a")), make_body(model, lora, "a"), make_step(0, 1.0, ROWS, layout)
    fused.pack()
    accumulate(fused, step, sft)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter *= 0.7
    gradients(parameters)
    expected, _ = accumulate(ModuleBody(model, list(parameters.values())), step, sft)
    wanted = gradients(parameters)
    total, _ = accumulate(fused, step, sft)
    assert total == pytest.approx(expected, rel=1e-5)
    assert worst_error(wanted, gradients(parameters)) < 1e-2


def error_of_rounding(exact, parameters, step, wanted, draw):
    """What exact gradients are off where every weight is off by half a unit of its last place or less."""
    torch.manual_seed(draw)
    before = [parameter.detach().clone() for parameter in exact.parameters()]
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter *= 1 + 2**-24 * (2 * torch.rand_like(parameter) - 1)
    accumulate(ModuleBody(exact), step, sft)
    found = worst_error(wanted, gradients(parameters))
    with torch.no_grad():
        for parameter, numbers in zip(exact.parameters(), before, strict=True):
            parameter.copy_(numbers)
    return found


def test_packing_takes_what_it_says_and_only_where_there_is_memory():
    model = make_decoder("llama", torch.float32)
    lora = adapted(model)
    parameters, fused = dict(lora.parameters("a")), make_body(model, lora, "a")
    for limit, packed in ((3 * fused.packed_bytes - 1, False), (10**12, True)):
        choose_layout(fused, parameters, make_step(0, 1.0, ROWS, Layout(1000)).examples, limit, share=True, pack=True)
        assert (fused.head.panels is not None) is packed


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_stands_in_for_the_embedding_that_is_its_weight(tied):
    model = make_decoder("llama", torch.float32)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    fused = make_body(model, adapted(model), "a")
    ids = torch.arange(SIZES["vocab_size"]).flip(0)
    expected = fused.decoder.embedding(ids)
    fused.pack()
    assert (fused.decoder.embedding.panels is not None) is tied
    assert torch.equal(fused.decoder.embedding(ids), expected)
    fused.unpack()
    assert fused.decoder.embedding.panels is None


def test_copies_of_the_weights_are_given_back_and_it_computes_on():
    model = make_decoder("llama", torch.float32)
    fused = make_body(model, adapted(model), "a")
    step = make_step(0, 1.0, ROWS, Layout(1000))
    expected, _ = accumulate(fused, step, sft, backward=False)
    fused.pack()
    packed = [weakref.ref(stack._whole) for layer in fused.decoder.layers for stack in layer.stacks]
    packed.append(weakref.ref(fused.head.panels))
    fused.unpack()
    assert not any(each() for each in packed)
    assert accumulate(fused, step, sft, backward=False)[0] == pytest.approx(expected, rel=1e-6)


def test_at_rest_a_body_keeps_nothing_for_the_next_pass():
    model = make_decoder("llama", torch.float32)
    lora = adapted(model)
    fused = make_body(model, lora, "a")
    accumulate(fused, make_step(0, 1.0, ROWS, Layout(1000)), sft)
    assert fused.decoder.slabs.free
    fused.rest()
    assert not fused.decoder.slabs.free


def test_a_row_longer_than_is_computed_at_a_time_is_not_said_to_be_too_large(monkeypatch):
    model = make_decoder("llama", torch.float32)
    lora = adapted(model)
    parameters, fused = dict(lora.parameters("a")), make_body(model, lora, "a")
    longest = max(len(inputs(row)) for row in ROWS)
    monkeypatch.setitem(choose_layout.__globals__, "LARGEST_BUDGET", longest - 1)
    layout = choose_layout(fused, parameters, ROWS, 10**12, share=True, pack=True)
    assert layout is not None
    assert layout.token_budget == longest


@pytest.mark.parametrize("fused", [True, False])
def test_a_prefix_is_gone_when_its_step_is(fused, monkeypatch):
    """Without the collector: what only that could free stays for hundreds of steps."""
    model = make_decoder("llama")
    lora = adapted(model)
    body = make_body(model, lora, "a") if fused else ModuleBody(model)
    kept, run_prefix = list[weakref.ref](), gradient.run_prefix

    def watched(*given):
        cache = run_prefix(*given)
        kept.extend(weakref.ref(tensor) for tensor in cache.tensors())
        return cache

    monkeypatch.setattr(gradient, "run_prefix", watched)
    step = make_step(0, 1.0, ROWS, Layout(100))
    gc.disable()
    try:
        accumulate(body, step, sft)
    finally:
        gc.enable()
    assert kept
    assert not [ref for ref in kept if ref() is not None]
