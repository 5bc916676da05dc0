"""What may be prepared, what shares, and what is refused by name."""

import pytest
import torch
import transformers as tf
from torch import nn

from decoders import SIZES, make_decoder
from tunesmith.errors import InputError
from tunesmith.tree.body import prepare
from tunesmith.tree.heads import head_of


def test_preparing_twice_is_preparing_once():
    model = make_decoder("llama", torch.float32)
    assert prepare(model) == prepare(model)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Granite", {"logits_scaling": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Phi", {"num_attention_heads": 2}),
        ("GPTNeoX", {}),
        ("Olmo2", {}),
    ],
)
def test_scaled_biased_and_other_heads_are_followed(kind, more):
    model = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**{**SIZES, **more}))
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    assert prepare(model).share
    assert head_of(model).weight.shape == (SIZES["vocab_size"], SIZES["hidden_size"])


@pytest.mark.parametrize("kind", ["Bloom", "Mamba"])
def test_a_model_that_keeps_attention_to_itself_is_refused_by_name(kind):
    config = getattr(tf, f"{kind}Config")(vocab_size=61, hidden_size=32, num_hidden_layers=2, n_layer=2, n_head=4)
    model = getattr(tf, f"{kind}ForCausalLM")(config)
    with pytest.raises(InputError, match=f"{kind}ForCausalLM does not go through transformers' attention interface"):
        prepare(model)


def test_a_model_with_a_head_of_its_own_is_refused_by_name():
    model = make_decoder("llama", torch.float32)
    model.lm_head.register_forward_hook(lambda module, args, out: out.square())
    with pytest.raises(InputError, match="LlamaForCausalLM computes something in its attention or output head"):
        prepare(model)
    assert model.config._attn_implementation != "tunesmith"


def test_layers_that_carry_a_state_turn_sharing_off_and_say_so():
    """A layer that mixes neighbouring rows of the flat sequence, as convolutions and recurrences do."""
    model = make_decoder("llama", torch.float32)
    layer = model.model.layers[0]
    layer.mlp.register_forward_hook(lambda module, args, out: out + out.roll(1, dims=1) * 0.5 * (out.shape[1] > 1))
    abilities = prepare(model)
    assert not abilities.share
    assert "LlamaForCausalLM carries a state" in str(abilities.reason)


def test_attention_sinks_are_not_silently_dropped():
    config = tf.GptOssConfig(
        **{**SIZES, "num_hidden_layers": 2}, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=16
    )
    with pytest.raises(InputError, match="GptOssForCausalLM"):
        prepare(tf.GptOssForCausalLM(config))
