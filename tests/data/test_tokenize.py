"""Through the real renderer with a tokenizer of bytes: what is cut, dropped and refused."""

from __future__ import annotations

import numpy as np
import pytest
from data_rows import chat, examples_of, recipe_data

from tunesmith.data.tokenize import tokenize
from tunesmith.errors import InputError

LONG = "x" * 300


def run(tmp_path, renderer, rows, limit=200, **keys):
    return tokenize(examples_of(tmp_path, rows), renderer, recipe_data("rows.jsonl", **keys), limit)


def texts(renderer, tokenized):
    return ["".join(renderer.pieces(example.input_ids.tolist())) for example in tokenized.examples]


def trained(renderer, example):
    return "".join(renderer.pieces(example.input_ids[example.weights > 0].tolist()))


def test_ids_and_weights_of_every_kind(tmp_path, renderer):
    (example,) = run(tmp_path, renderer, [chat("ask", "answer")]).examples
    assert (example.input_ids.dtype, example.weights.dtype) == (np.int32, np.float32)
    assert trained(renderer, example) == "answer<|im_end|>"
    (plain,) = run(tmp_path, renderer, [{"prompt": "2+2=", "completion": "4"}]).examples
    assert trained(renderer, plain) == "4<|endoftext|>"
    (text,) = run(tmp_path, renderer, [{"text": "story"}]).examples
    assert trained(renderer, text) == "tory<|endoftext|>"  # nothing stands before the first token


def test_counts(tmp_path, renderer):
    done = run(tmp_path, renderer, [chat("ask", "four"), chat("a", "b")])
    assert done.tokens == sum(len(example.input_ids) for example in done.examples)
    assert done.supervised_tokens == 5 + 2
    assert done.sentences(200) == []


def test_long_rows_are_refused_with_their_lines(tmp_path, renderer):
    rows = [chat("a", "b"), chat(LONG, "b"), chat("a", "b"), chat("a", LONG)]
    with pytest.raises(InputError) as error:
        run(tmp_path, renderer, rows)
    assert "rows.jsonl line 2: the row has " in str(error.value)
    assert "2 rows are over it" in str(error.value)
    assert "lines 2, 4" in str(error.value)


def test_long_rows_are_dropped_and_counted(tmp_path, renderer):
    done = run(tmp_path, renderer, [chat("a", "b"), chat(LONG, "b")], on_long="drop")
    assert (len(done.examples), [source.line for source in done.dropped]) == (1, [2])
    assert done.sentences(200)[0].startswith("1 row longer than 200 tokens were left out: ")


def test_dropping_every_row_is_an_error(tmp_path, renderer):
    with pytest.raises(InputError, match="none is left"):
        run(tmp_path, renderer, [chat(LONG, "b")], on_long="drop")


def test_truncation_takes_as_little_as_it_must_from_the_start_of_the_question(tmp_path, renderer):
    question = "".join(str(i % 10) for i in range(300))
    done = run(tmp_path, renderer, [chat(question, "the answer")], on_long="truncate")
    (text,) = texts(renderer, done)
    assert len(done.examples[0].input_ids) == 200
    assert trained(renderer, done.examples[0]) == "the answer<|im_end|>"
    kept = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    assert question.endswith(kept)
    assert done.truncated[0].line == 1
    assert "never an answer" in done.sentences(200)[0]


def test_truncation_drops_the_oldest_exchanges_first_and_keeps_the_system_turn(tmp_path, renderer):
    turns = chat("old question " * 9, "old answer", "new question", "new answer")["messages"]
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *turns]}]
    done = run(tmp_path, renderer, rows, on_long="truncate")
    (text,) = texts(renderer, done)
    assert "Be brief." in text
    assert "old" not in text
    assert "new question" in text
    assert done.lost_answers == 1
    assert "1 earlier answer went" in done.sentences(200)[0]


def test_an_answer_that_does_not_fit_is_never_cut(tmp_path, renderer):
    for row in (chat("a", LONG), {"prompt": "a", "completion": LONG}):
        with pytest.raises(InputError, match="line 1: the answer does not fit"):
            run(tmp_path, renderer, [row], on_long="truncate")


def test_truncation_of_plain_prompts_and_texts(tmp_path, renderer):
    (plain,) = texts(renderer, run(tmp_path, renderer, [{"prompt": "ab" * 200, "completion": "c"}], on_long="truncate"))
    assert plain == ("ab" * 200)[-198:] + "c<|endoftext|>"
    (text,) = texts(renderer, run(tmp_path, renderer, [{"text": "ab" * 200}], on_long="truncate"))
    assert text == ("ab" * 200)[:200]


def test_a_row_that_trains_nothing_is_an_error(tmp_path, renderer):
    idle = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    with pytest.raises(
        InputError, match=r"line 2: no token of the row would be trained on \(2 rows in all: .*lines 2, 3"
    ):
        run(tmp_path, renderer, [chat("a", "b"), idle, {**idle, "n": 1}])


def test_a_template_that_refuses_a_row_is_named_with_its_line(tmp_path):
    from conftest import CHATML, byte_tokenizer
    from tunesmith.chat.renderer import Renderer

    template = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    strict = Renderer.from_tokenizer(byte_tokenizer(template))
    with pytest.raises(InputError, match=r"line 2: .*one turn only"):
        run(tmp_path, strict, [chat("a", "b"), chat("a", "b", "c", "d")])


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_preference_is_its_prompt_with_each_answer(tmp_path, renderer):
    rows = [pair("ask", "good", "bad"), pair([*chat("a", "b")["messages"], {"role": "user", "content": "c"}], "x", "y")]
    tokenized = run(tmp_path, renderer, rows)
    assert tokenized.together == 2
    assert [trained(renderer, each) for each in tokenized.examples] == [
        f"{a}<|im_end|>" for a in ("good", "bad", "x", "y")
    ]
    for chosen, rejected in zip(tokenized.examples[0::2], tokenized.examples[1::2], strict=True):
        start = int(np.flatnonzero(chosen.weights)[0])
        assert start == int(np.flatnonzero(rejected.weights)[0])
        assert (chosen.input_ids[:start] == rejected.input_ids[:start]).all()


def test_both_answers_of_a_long_preference_lose_the_same_of_their_prompt(tmp_path, renderer):
    tokenized = run(tmp_path, renderer, [pair(LONG + "end", "good", "worse")], limit=120, on_long="truncate")
    chosen, rejected = texts(renderer, tokenized)
    assert chosen.partition("good")[0] == rejected.partition("worse")[0]
    assert "xend<|im_end|>" in chosen
    assert len(tokenized.examples[1].input_ids) <= 120
    assert run(tmp_path, renderer, [pair(LONG, "a", "b"), pair("c", "a", "b")], on_long="drop").dropped[0].line == 1
    with pytest.raises(InputError, match="line 1: the row has"):
        run(tmp_path, renderer, [pair("short", LONG, "b")])


def test_every_token_of_a_long_text_is_learned_once_in_pieces_under_the_limit(tmp_path, renderer):
    long = "".join(f"{i} " for i in range(150))
    examples = examples_of(tmp_path, [{"text": long}, {"text": "short"}])
    tokenized = tokenize(examples, renderer, recipe_data("rows.jsonl"), 100, pieces=True)
    *pieces, short = texts(renderer, tokenized)
    assert all(len(each.input_ids) <= 100 for each in tokenized.examples)
    assert pieces[0] + "".join(piece[1:] for piece in pieces[1:]) == long + "<|endoftext|>"
    assert short == "short<|endoftext|>"
    whole = tokenize(examples, renderer, recipe_data("rows.jsonl"), 10_000)
    assert tokenized.supervised_tokens == whole.supervised_tokens
    assert all(each.weights[0] == 0 for each in tokenized.examples)


@pytest.mark.parametrize("length", [98, 99, 100, 101, 198, 199, 200])
def test_no_piece_is_left_with_nothing_to_learn(tmp_path, renderer, length):
    examples = examples_of(tmp_path, [{"text": "x" * length}])
    tokenized = tokenize(examples, renderer, recipe_data("rows.jsonl"), 100, pieces=True)
    assert all(each.weights.any() for each in tokenized.examples)
    assert tokenized.supervised_tokens == length  # and the end of text, less the first token


def test_a_stranger_is_the_prompt_with_the_next_rows_answer(tmp_path, renderer):
    examples = examples_of(tmp_path, [pair("ask", "good", "bad"), pair("two", "x" * 20, "y"), pair("three", "z", "w")])
    tokenized = tokenize(examples, renderer, recipe_data("rows.jsonl"), 80, strangers=True)
    assert tokenized.together == 3
    strangers, chosen = tokenized.examples[2::3], tokenized.examples[0::3]
    assert [trained(renderer, each) for each in strangers] == ["x" * 20 + "<|im_end|>", "z<|im_end|>", "good<|im_end|>"]
    for own, other in zip(chosen, strangers, strict=True):
        start = int(np.flatnonzero(own.weights)[0])
        assert (own.input_ids[:start] == other.input_ids[:start]).all()
        assert int(np.flatnonzero(other.weights)[0]) == start
