"""Weights of 8 bits: the numbers they stand for, whatever computes with them and whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
from tunesmith.models.int8 import Int8
from tunesmith.models.loading import load_base
from tunesmith.models.lora import linears
from tunesmith.models.packed import PackedLinear
from tunesmith.models.quantised import quantised_linears


def rounded(weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty(weight.shape)
    Int8(weight).write(out.view(-1))
    return out


def product(weights: list[torch.Tensor], biases: list[torch.Tensor | None] | tuple = ()) -> PackedLinear:
    biases = biases or [None] * len(weights)
    return pack_integers([Linear(Int8(w), b, len(w)) for w, b in zip(weights, biases, strict=True)])


class Linear(NamedTuple):
    stored: Int8
    bias: torch.Tensor | None
    out_features: int


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_a_product_is_that_of_the_rounded_weights(rows: int) -> None:
    torch.manual_seed(rows)
    weights = [torch.randn(24, 40), torch.randn(8, 40) * 30]
    biases = [torch.randn(24), None]
    x = torch.randn(rows, 40)
    x[:, 3] *= 40
    expected = torch.cat([F.linear(x, rounded(w), b) for w, b in zip(weights, biases, strict=True)], 1)
    found = product(weights, biases)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    linear, x = product([torch.randn(33, 40)]), torch.randn(9, 40) * torch.logspace(-3, 3, 9)[:, None]
    for row in range(9):
        assert torch.equal(linear(x)[row], linear(x[row : row + 1])[0])


def test_the_engine_says_what_transformers_says_with_the_rounded_weights(tmp_path: Path) -> None:
    tiny_llama.save(tmp_path, initializer_range=0.25)
    engine = Engine(tmp_path, quantize="int8")
    assert isinstance(engine._core._body, PackedBody)
    assert isinstance(engine._core._body._layers[0].down._packed, PackedLinear)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for linear in linears(model).values():
        linear.weight.data = rounded(linear.weight.data)
    prompt = list(range(5, 25))
    answer = engine.generate([Request(prompt_ids=prompt, max_tokens=12, ignore_stop=True, logprobs=True)])[0]
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1], -1)
    assert answer.logprobs == pytest.approx(scores[range(12), answer.ids].tolist(), abs=1e-4)
    assert answer.ids == scores.argmax(-1).tolist()
    with pytest.raises(InputError, match="quantize"):
        Engine(tmp_path, quantize="int3")  # type: ignore[arg-type]


def test_the_integers_multiplied_are_those_that_an_adapter_is_trained_over(tmp_path: Path) -> None:
    """Packing them is a copy, never another rounding."""
    base = load_base(str(tiny_llama.save(tmp_path)), quantize="int8")
    for linear in quantised_linears(base.model):
        x = torch.eye(linear.in_features)
        assert torch.allclose(pack_integers([linear])(x).t(), linear.weight, rtol=1e-6, atol=0)
