"""Answers held to a grammar: what comes out matches it, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import jsonschema
import pytest
from tiny import CONFIGS, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.chat.renderer import Renderer
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Request
from tunesmith.errors import InputError
from tunesmith.models.lora import wrap

SCHEMA = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["house", "flat"]},
        "number": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["street", "kind", "number", "tags"],
    "additionalProperties": False,
}


@cache
def engine() -> Engine:
    """A model of 300 rows over a byte-level vocabulary of 257 tokens and a few merges: ` "` and `":`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["</s>", *letters, 'Ġ"', '":'])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", '"'), ('"', ":")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    CONFIGS["llama"].vocab_size, before = 300, CONFIGS["llama"].vocab_size
    try:
        model = build("llama")
    finally:
        CONFIGS["llama"].vocab_size = before
    return Engine.over(wrap(model), Renderer.from_tokenizer(fast), context_length=256, tokenizer=fast)


def ask(**settings) -> str:
    settings = {"prompt": "Say: ", "max_tokens": 200, "temperature": 1.0, "seed": 5, **settings}
    answer = engine().generate([Request(**settings)])[0]
    assert answer.finish_reason == "stop", answer
    return answer.text


def test_json_schema() -> None:
    for seed in range(4):
        jsonschema.validate(json.loads(ask(schema=SCHEMA, seed=seed)), SCHEMA)


def test_regex_choice_and_lark() -> None:
    assert re.fullmatch(r"[A-Z]{2}-\d{4}", ask(regex=r"[A-Z]{2}-[0-9]{4}"))
    options = ['say "hi"', "back\\slash", "größer 😀", "two\nlines"]
    assert {ask(choice=options, seed=seed) for seed in range(6)} <= set(options)
    assert re.fullmatch(r"(ab)+!", ask(grammar='start: ("ab")+ "!"'))


def test_forced_tokens_are_not_sampled_but_are_there_unless_logprobs_are_wanted() -> None:
    request = {"prompt": "x", "max_tokens": 50, "choice": ["the only answer"]}
    skipped, chosen = engine().generate([Request(**request), Request(**request, logprobs=True)])
    assert skipped.text == chosen.text == "the only answer"
    assert len(chosen.logprobs) == len(chosen.ids)
    assert chosen.logprobs == pytest.approx(engine().logprobs(engine().renderer.completion_prompt_ids("x"), chosen.ids))


def test_an_answer_that_a_grammar_would_leave_as_it_is_is_known_without_asking() -> None:
    """Whatever was answered freely: where the grammar keeps it, the constrained answer is the same, else another."""
    letters = engine().renderer.completion_prompt_ids("abcdefgh")[-8:]  # what it would say is no text otherwise
    kept = []
    for prompt in ("abc", "x", "Say: ", "1 2 3"):
        for length in (3, 9):
            free = Request(prompt=prompt, max_tokens=length, logit_bias=dict.fromkeys(letters, 50.0))
            said = engine().generate([free])[0]
            for pattern in (".{1,40}", ".{4}", ".{9}.*", said.text, said.text + "!", "[a-c]{3}", said.text[0] + ".*"):
                held = replace(free, regex=pattern)
                answer = engine().generate([held])[0]
                keeps = engine().keeps(held, said.ids)
                assert not keeps or answer.text == said.text, (prompt, pattern)
                kept.append(keeps)
    assert 8 <= sum(kept) <= len(kept) - 16


def test_an_answer_that_stops_is_kept_only_where_the_grammar_may_end() -> None:
    ids = engine().renderer.completion_prompt_ids("aa")[-2:]
    end = min(engine().renderer.stop_ids)
    request = {"prompt": "x", "max_tokens": 9}
    assert engine().keeps(Request(**request, regex="a{2,3}"), [*ids, end])
    assert engine().keeps(Request(**request, regex="aa"), [*ids, end])
    assert not engine().keeps(Request(**request, regex="a{3}"), [*ids, end])
    assert not engine().keeps(Request(**request, regex="a"), [*ids, end])


def test_constrained_and_free_answers_in_one_batch() -> None:
    free = Request(prompt="abc", max_tokens=12, ignore_stop=True)
    held = [Request(prompt="abc", max_tokens=60, regex="[ab]{5}", temperature=1.0, seed=n) for n in range(3)]
    alone = engine().generate([free])[0].ids
    answers = engine().generate([held[0], free, *held[1:]])
    assert answers[1].ids == alone
    assert all(re.fullmatch("[ab]{5}", answers[i].text) for i in (0, 2, 3))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"schema": {"allOf": [{"type": "string"}, {"type": "number"}]}}, "nsatisfiable"),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"schema": {"type": "banana"}}, "banana"),
        ({"schema": False}, "schema is false"),
        ({"regex": "("}, "regex"),
        ({"choice": []}, "at least one"),
        ({"grammar": "start: nope"}, "nope"),
    ],
)
def test_a_grammar_that_nothing_satisfies_is_a_sentence(grammar: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine().generate([Request(prompt="x", **grammar)])


def test_a_grammar_cut_short_by_the_length_says_so() -> None:
    answer = engine().generate([Request(prompt="x", max_tokens=3, schema=SCHEMA)])[0]
    assert (answer.finish_reason, len(answer.ids)) == ("length", 3)
