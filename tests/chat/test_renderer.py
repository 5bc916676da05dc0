"""An example is the prompt the engine is given plus what must then be said, through every shape of chat template."""

from __future__ import annotations

import pytest
from chat_shapes import ALL, TEMPLATES, byte_level, sentencepiece_like, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.chat.renderer import Renderer
from tunesmith.errors import InputError

TWO_TURNS = [
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "the lazy dog?"},
    {"role": "assistant", "content": "Yes, 12345"},
]
NESTING = ["chatml", "llama3", "gemma", "mistral", "chatml-keeps-last-thought"]


def answers(renderer: Renderer, ids: list[int], weights: list[float]) -> list[list[int]]:
    """The trained spans of an example."""
    spans: list[list[int]] = []
    for i, (token, weight) in enumerate(zip(ids, weights, strict=True)):
        if weight:
            if not weights[i - 1]:
                spans.append([])
            spans[-1].append(token)
    return spans


@pytest.mark.parametrize("name", ALL)
def test_an_example_is_the_engines_prompt_then_the_answer_then_a_stop_token(name) -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of(name))
    examples = renderer.chat_example(TWO_TURNS[:2])
    assert len(examples) == 1
    ids, weights = examples[0]
    prompt = renderer.prompt_ids(TWO_TURNS[:1])
    assert ids[: len(prompt)] == prompt
    assert weights == [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))
    assert ids[-1] in renderer.stop_ids
    assert renderer.decode(ids[len(prompt) :]).strip() == "Paris."
    assert not set(ids[len(prompt) : -1]) & renderer.stop_ids, "the engine would stop before the end"


@pytest.mark.parametrize("name", ALL)
def test_every_trained_turn_starts_with_the_engines_prompt(name) -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of(name))
    examples = renderer.chat_example(TWO_TURNS)
    spans = [span for ids, weights in examples for span in answers(renderer, ids, weights)]
    assert [renderer.decode(span).strip() for span in spans] == ["Paris.", "Yes, 12345"]
    assert all(span[-1] == renderer.stop_id for span in spans)
    for turn in (1, 3):
        prompt = renderer.prompt_ids(TWO_TURNS[:turn])
        # in some example, the turn's prompt is followed by a trained token and ends where that begins
        assert any(
            ids[: len(prompt)] == prompt and weights[len(prompt)] == 1.0 and weights[len(prompt) - 1] == 0.0
            for ids, weights in examples
        )


@pytest.mark.parametrize("name", NESTING)
def test_turns_that_nest_are_one_example(name) -> None:
    assert len(Renderer.from_tokenizer(tokenizer_of(name)).chat_example(TWO_TURNS)) == 1


@pytest.mark.parametrize(("name", "first"), [("chatml-keeps-last-thought", "<think>\nfox</think>Paris.")])
def test_turns_that_do_not_nest_are_an_example_each(name, first) -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of(name))
    turns = [TWO_TURNS[0], {"role": "assistant", "content": first}, *TWO_TURNS[2:]]
    examples = renderer.chat_example(turns)
    assert [[renderer.decode(s) for s in answers(renderer, *e)] for e in examples] == [[first], ["Yes, 12345"]]
    assert "fox" not in renderer.decode(examples[1][0])


def test_a_template_whose_prompt_opens_a_thought_keeps_that_prompt() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("think"))
    thought = [TWO_TURNS[0], {"role": "assistant", "content": "<think>\nfox\n</think>\n\nParis."}]
    plain = [TWO_TURNS[0], {"role": "assistant", "content": "Paris."}]
    bracketed = [TWO_TURNS[0], {"role": "assistant", "content": "<thin dog>"}]
    prompt = renderer.prompt_ids(TWO_TURNS[:1])
    for turns, said in ((thought, "fox\n</think>\n\nParis."), (plain, "Paris."), (bracketed, "<thin dog>")):
        ids, weights = renderer.chat_example(turns)[0]
        assert renderer.decode(ids[: len(prompt)]).endswith("<think>\n")
        assert ids[: len(prompt)] == prompt
        assert renderer.decode(ids[len(prompt) :]) == said
        assert ids[-1] == renderer.stop_id
        assert sum(weights) == len(ids) - len(prompt)


def test_what_a_template_prints_after_the_stop_token_is_left_out() -> None:
    for name in ("chatml", "chatml-with-final-eos", "end-token-twice"):
        renderer = Renderer.from_tokenizer(tokenizer_of(name))
        ids, _ = renderer.chat_example(TWO_TURNS[:2])[0]
        assert renderer.stop_id not in ids[:-1][len(renderer.prompt_ids(TWO_TURNS[:1])) :]


def test_the_stop_token_is_found_by_rendering() -> None:
    expected = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
    for name, token in expected.items():
        tokenizer = tokenizer_of(name)
        renderer = Renderer.from_tokenizer(tokenizer, stop_ids=[7])
        assert renderer.stop_id == tokenizer.convert_tokens_to_ids(token)
        assert renderer.stop_ids == {renderer.stop_id, tokenizer.eos_token_id, 7}


def test_pad_equal_to_the_stop_token_is_still_trained() -> None:
    """trl#1623, axolotl PR#1847: the end-of-turn token was masked as padding, so the model never stopped."""
    tokenizer = tokenizer_of("mistral")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids, weights = Renderer.from_tokenizer(tokenizer).chat_example(TWO_TURNS[:2])[0]
    assert (ids[-1], weights[-1]) == (tokenizer.pad_token_id, 1.0)


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral", "think"])
def test_bos_stands_exactly_once(name) -> None:
    """unsloth#976, ollama#6823: the template's BOS and the tokenizer's made two."""
    tokenizer = tokenizer_of(name)
    renderer = Renderer.from_tokenizer(tokenizer)
    bos = tokenizer.bos_token_id
    for ids in (
        renderer.prompt_ids(TWO_TURNS[:1]),
        renderer.chat_example(TWO_TURNS)[0][0],
        renderer.completion_prompt_ids("fox"),
        renderer.completion_prompt_ids(tokenizer.bos_token + "fox"),
        renderer.text_example("fox")[0],
    ):
        assert ids[0] == bos
        assert ids.count(bos) == 1


@pytest.mark.parametrize("name", [*TEMPLATES, "ordinary-text"])
def test_the_prompt_is_what_transformers_gives_other_servers(name) -> None:
    tokenizer = tokenizer_of(name)
    theirs = tokenizer.apply_chat_template(TWO_TURNS[:3], add_generation_prompt=True, return_dict=False)
    assert Renderer.from_tokenizer(tokenizer).prompt_ids(TWO_TURNS[:3]) == theirs


@pytest.mark.parametrize("split", [False, True])
def test_a_tokenizer_that_cuts_and_fills_up_does_neither_here(split: bool) -> None:
    """tokenizer.json may say both; transformers ignores them in a call without options."""
    tokenizer = byte_level("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.split_special_tokens = split
    theirs = tokenizer.apply_chat_template(TWO_TURNS[:3], add_generation_prompt=True, return_dict=False)
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    tokenizer.backend_tokenizer.enable_padding(length=400)
    assert Renderer.from_tokenizer(tokenizer).prompt_ids(TWO_TURNS[:3]) == theirs


def test_train_on() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("chatml"))
    [(ids, every)] = renderer.chat_example(TWO_TURNS)
    [(_, last)] = renderer.chat_example(TWO_TURNS, train_on="last")
    [(whole, all_)] = renderer.chat_example(TWO_TURNS, train_on="all")
    assert ids == whole
    assert all_ == [0.0] + [1.0] * (len(ids) - 1)
    prompt = len(renderer.prompt_ids(TWO_TURNS[:3]))
    assert last == [0.0] * prompt + [1.0] * (len(ids) - prompt)
    assert every[prompt:] == last[prompt:]
    assert sum(every) > sum(last)


def test_weight_0_keeps_a_turn_out() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("chatml"))
    off = [TWO_TURNS[0], {**TWO_TURNS[1], "weight": 0}, *TWO_TURNS[2:]]
    [(ids, weights)] = renderer.chat_example(off)
    assert renderer.chat_example(TWO_TURNS, train_on="last") == [(ids, weights)]
    [(_, all_)] = renderer.chat_example(off, train_on="all")
    start, end = len(renderer.prompt_ids(off[:1])), len(renderer.chat_example(off[:2])[0][0])
    assert all_[start:end] == [0.0] * (end - start)
    assert sum(all_) == len(ids) - 1 - (end - start)
    both_off = [TWO_TURNS[0], {**TWO_TURNS[1], "weight": 0}]
    assert sum(renderer.chat_example(both_off)[0][1]) == 0


def test_a_row_without_an_assistant_turn_is_a_sentence() -> None:
    with pytest.raises(InputError, match="no assistant turn"):
        Renderer.from_tokenizer(tokenizer_of("chatml")).chat_example(TWO_TURNS[:1])


def test_an_empty_answer_trains_the_stop_token() -> None:
    for name in ALL:
        renderer = Renderer.from_tokenizer(tokenizer_of(name))
        [(ids, weights)] = renderer.chat_example([TWO_TURNS[0], {"role": "assistant", "content": ""}])
        assert (ids[-1], weights[-1]) == (renderer.stop_id, 1.0), name


@pytest.mark.parametrize("name", ["chatml", "ordinary-text", "think"])
def test_an_answer_that_contains_a_stop_token_is_kept_whole(name) -> None:
    tokenizer = tokenizer_of(name)
    renderer = Renderer.from_tokenizer(tokenizer)
    content = f"fox{tokenizer.decode([renderer.stop_id])}dog"
    [(ids, weights)] = renderer.chat_example([TWO_TURNS[0], {"role": "assistant", "content": content}])
    said = [token for token, weight in zip(ids, weights, strict=True) if weight]
    assert tokenizer.decode(said) == content + tokenizer.decode([renderer.stop_id])


def test_completions_and_texts() -> None:
    tokenizer = byte_level("llama3")
    renderer = Renderer.from_tokenizer(tokenizer)
    ids, weights = renderer.completion_example("The quick", " brown fox")
    prompt = tokenizer("The quick")["input_ids"]
    completion = tokenizer(" brown fox", add_special_tokens=False)["input_ids"]
    assert ids == [*prompt, *completion, tokenizer.eos_token_id]
    assert weights == [0.0] * len(prompt) + [1.0] * (len(completion) + 1)
    ids, weights = renderer.text_example("The quick")
    assert ids == [*prompt, tokenizer.eos_token_id]
    assert weights == [0.0] + [1.0] * len(prompt)
    assert renderer.completion_example("a", "b" + tokenizer.eos_token)[0].count(tokenizer.eos_token_id) == 1


def test_the_first_token_of_all_is_never_a_target() -> None:
    renderer = Renderer.from_tokenizer(byte_level("chatml"))
    assert renderer.completion_example("", "fox")[1][0] == 0.0
    assert renderer.text_example("fox")[1][0] == 0.0


@given(st.text(min_size=1, max_size=30), st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_ids_decode_to_the_texts_they_were_made_of(prompt: str, completion: str) -> None:
    for tokenizer in (BYTES, PIECES):
        renderer = Renderer.from_tokenizer(tokenizer)
        ids, weights = renderer.completion_example(prompt, completion)
        assert len(ids) == len(weights)
        if not any(token in prompt + completion for token in tokenizer.all_special_tokens):
            expected = (prompt + completion).replace("▁", " ")
            assert renderer.decode(ids) == (expected if tokenizer is PIECES else prompt + completion)


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_pieces_join_to_the_text(text: str) -> None:
    for tokenizer in (BYTES, PIECES):
        ids = tokenizer(text)["input_ids"]
        pieces = Renderer.from_tokenizer(tokenizer).pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


BYTES, PIECES = byte_level("llama3"), sentencepiece_like("mistral")


def test_sentencepiece_answers_get_no_space_of_their_own() -> None:
    tokenizer = sentencepiece_like("mistral")
    tokenizer.chat_template = TEMPLATES["mistral"]
    renderer = Renderer.from_tokenizer(tokenizer)
    [(ids, _)] = renderer.chat_example(TWO_TURNS[:2])
    whole = tokenizer.apply_chat_template(TWO_TURNS[:2], return_dict=False)
    assert ids == whole
    assert renderer.decode(renderer.completion_example("The", "fox")[0]) == "Thefox"


def test_a_default_system_prompt_is_for_rows_that_carry_none() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("chatml"), default_system="Be quick.")
    assert "Be quick." in renderer.decode(renderer.prompt_ids(TWO_TURNS[:1]))
    own = [{"role": "system", "content": "Be lazy."}, *TWO_TURNS[:1]]
    text = renderer.decode(renderer.prompt_ids(own))
    assert "Be lazy." in text
    assert "quick" not in text


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = byte_level("chatml")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        Renderer.from_tokenizer(tokenizer)


@pytest.mark.base
def test_the_real_base(base) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    renderer = Renderer.from_tokenizer(tokenizer)
    assert renderer.prompt_ids(TWO_TURNS[:1]) == tokenizer.apply_chat_template(
        TWO_TURNS[:1], add_generation_prompt=True, return_dict=False
    )
    [(ids, weights)] = renderer.chat_example(TWO_TURNS)
    assert tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight]) == (
        "Paris.<|im_end|>Yes, 12345<|im_end|>"
    )
    assert (renderer.stop_ids, renderer.vocab_size, renderer.notes) == ({2}, 49152, ())
