"""From tokens back to a message, and an example shown as it is trained."""

from __future__ import annotations

import json

import pytest
from chat_shapes import tokenizer_of

from tunesmith.chat.display import READ, TRAINED, coloured
from tunesmith.chat.parse import parse_answer, spoken
from tunesmith.chat.renderer import Renderer


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ('<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', ["a"]),
        ('Wait.\n<tool_call>\n{"name": "a"}\n</tool_call>\n<tool_call>{"name": "b"}</tool_call>', ["a", "b"]),
        ('[TOOL_CALLS] [{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]', ["a", "b"]),
        ('<|python_tag|>{"name": "a", "parameters": {"x": "é"}}', ["a"]),
    ],
)
def test_calls_are_found_in_every_notation(raw, names) -> None:
    message = parse_answer(raw=raw, text=raw)
    assert [call["function"]["name"] for call in message["tool_calls"]] == names
    assert len({call["id"] for call in message["tool_calls"]}) == len(names)
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in message["tool_calls"])


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "Paris.",
        '{"AddressNumber": "12"}',
        "<tool_call>not json</tool_call>",
        '<tool_call>["a"]</tool_call>',
        "[TOOL_CALLS] [1]",
    ],
)
def test_what_is_not_a_call_stays_text(raw) -> None:
    assert parse_answer(raw=raw, text=raw) == {"role": "assistant", "content": raw}


@pytest.mark.parametrize(
    "raw", ["<think>\n\n</think>\n\nParis.", "\n</think>\n\nParis.", "<think>a</think> <think>b</think>Paris."]
)
def test_reasoning_is_no_part_of_the_answer(raw) -> None:
    assert spoken(raw) == "Paris."
    assert parse_answer(raw=raw, text=raw) == {"role": "assistant", "content": "Paris."}
    assert spoken("Paris.") == "Paris."


def test_an_answer_ends_at_its_stop_token() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("chatml"))
    [(ids, weights)] = renderer.chat_example(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "fox"}]
    )
    said = [token for token, weight in zip(ids, weights, strict=True) if weight]
    assert renderer.parse([*said, *said]) == {"role": "assistant", "content": "fox"}


def test_the_trained_part_is_coloured() -> None:
    text = coloured(["a", "b", "c", "d"], [0.0, 0.0, 1.0, 0.5])
    assert text.plain == "abcd"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(0, 2, READ), (2, 4, TRAINED)]
