"""Weights of 8 bits: the numbers they stand for, whatever computes with them and whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

import tiny_llama
from tunesmith.engine.body import PackedBody
from tunesmith.engine.engine import Engine
from tunesmith.engine.packing import pack_integers
from tunesmith.engine.request import Request
from tunesmith.errors import InputError
from tunesmith.models.int8 import Int8, Int8Linear
from tunesmith.models.loading import load_base
from tunesmith.models.lora import linears
from tunesmith.models.quantised import quantised_linears


def rounded(weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty(weight.shape)
    Int8(weight).write(out.view(-1))
    return out


def product(weights: list[torch.Tensor], biases: list[torch.Tensor | None] | tuple = ()) -> Int8Linear:
    return Int8Linear([Int8(weight) for weight in weights], biases)


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_a_product_is_that_of_the_rounded_weights_even_where_inputs_are_uneven(rows: int) -> None:
    torch.manual_seed(rows)
    weights = [torch.randn(24, 40), torch.randn(8, 40) * 30]
    biases = [torch.randn(24), None]
    x = torch.randn(rows, 40)
    x[:, 3] *= 40  # such channels are what one integer of 8 bits to an input cannot say
    expected = torch.cat([F.linear(x, rounded(w), b) for w, b in zip(weights, biases, strict=True)], 1)
    found = product(weights, biases)(x)
    allowed = 1.5e-4 * x.abs().amax(1, keepdim=True) * torch.cat([rounded(w).norm(dim=1) for w in weights])
    assert ((found - expected).abs() <= allowed).all()


def test_the_extremes_of_both_sides_do_not_overflow() -> None:
    """Two products of 8 bits are added up in 16 where a machine lacks VNNI."""
    weight, x = torch.ones(16, 64), torch.ones(2, 64)
    assert torch.allclose(product([weight])(x), torch.full((2, 16), 64.0), rtol=1e-4)
    assert torch.equal(product([weight])(torch.zeros(1, 64)), torch.zeros(1, 16))


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    linear, x = product([torch.randn(33, 40)]), torch.randn(9, 40) * torch.logspace(-3, 3, 9)[:, None]
    for row in range(9):
        assert torch.allclose(linear(x)[row], linear(x[row : row + 1])[0], rtol=1e-6, atol=0)


def test_the_engine_says_what_transformers_says_with_the_rounded_weights(tmp_path: Path) -> None:
    tiny_llama.save(tmp_path, initializer_range=0.25)
    engine = Engine(tmp_path, quantize="int8")
    assert isinstance(engine._core._body, PackedBody)
    assert isinstance(engine._core._body._layers[0].down._packed, Int8Linear)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for linear in linears(model).values():
        linear.weight.data = rounded(linear.weight.data)
    prompt = list(range(5, 25))
    answer = engine.generate([Request(prompt_ids=prompt, max_tokens=12, ignore_stop=True, logprobs=True)])[0]
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1], -1)
    assert answer.logprobs == pytest.approx(scores[range(12), answer.ids].tolist(), abs=5e-3)
    assert answer.ids == scores.argmax(-1).tolist()
    with pytest.raises(InputError, match="quantize"):
        Engine(tmp_path, quantize="int3")  # type: ignore[arg-type]


def test_the_integers_multiplied_are_those_that_an_adapter_is_trained_over(tmp_path: Path) -> None:
    """Packing them is a copy, never another rounding."""
    base = load_base(str(tiny_llama.save(tmp_path)), quantize="int8")
    for linear in quantised_linears(base.model):
        x = torch.eye(linear.in_features)
        assert torch.allclose(pack_integers([linear])(x).t(), linear.weight, rtol=1e-6, atol=0)
