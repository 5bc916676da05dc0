"""The loss and gradients of a tree on any device are those of the rows one by one through a dense mask on the CPU."""

import copy

import pytest
import torch
import transformers as tf

from decoders import SIZES, gradients, make_rows, one_by_one, worst_error
from devices import DEVICES
from tunesmith.data.batches import Layout, make_step
from tunesmith.models.lora import add_new_adapter, wrap
from tunesmith.recipe import Adapter, Train
from tunesmith.train.bodies import make_body
from tunesmith.train.forward import ModuleBody
from tunesmith.train.gradient import accumulate
from tunesmith.train.loop import train
from tunesmith.train.losses import sft
from tunesmith.tree.body import prepare

WIDE = {**SIZES, "hidden_size": 64, "head_dim": 16}  # FlexAttention takes heads of 16 and more
WINDOWED = {**WIDE, "sliding_window": 6, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.7}
MAKE = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**WINDOWED)),
}


def make(name):
    torch.manual_seed(0)
    model = MAKE[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["32", "bf16"])
def test_a_tree_on_a_device_gives_the_loss_and_gradients_of_its_rows(device, name, dtype, tolerance):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("a CPU trains in float32")
    alone, rows = make(name), make_rows(prompt=70)
    model = copy.deepcopy(alone).to(device, dtype)
    prepare(alone)
    assert prepare(model).share
    expected = one_by_one(alone, rows)
    expected.backward()
    wanted = gradients(dict(alone.named_parameters()))
    for layout in (Layout(1000), Layout(100)):  # one tree, and micro-batches behind a prefix
        step = make_step(0, 1.0, rows, layout)
        total, _ = accumulate(ModuleBody(model), step, sft)
        assert total == pytest.approx(expected.item(), rel=tolerance / 10)
        found = gradients(dict(model.named_parameters()))
        assert worst_error(wanted, {n: g.float().cpu() * step.weight for n, g in found.items()}) < tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_learns_on_a_device_as_it_does_on_the_cpu(device):
    """Through the loop: fused AdamW, clipping, and an adapter in float32 whatever the base is in."""
    ends = []
    for place in ("cpu", device):
        model = make("llama").to(place)
        lora = wrap(model)
        add_new_adapter(lora, "a", Adapter(rank=3), seed=0)
        lora.use("a")
        prepare(model)
        parameters = dict(lora.parameters("a"))
        steps = [make_step(i, 1.0, make_rows(prompt=70), Layout(100)) for i in range(4)]
        train(make_body(model, lora, "a"), parameters, steps, sft, Train(), lr=1e-3)
        ends.append({n: p.detach().cpu() for n, p in parameters.items()})
    for name, alone in ends[0].items():
        torch.testing.assert_close(ends[1][name], alone, rtol=1e-2, atol=1e-4)
