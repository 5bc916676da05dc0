"""What templates need that differs: a system turn, tools, today's date, or a template at all."""

from __future__ import annotations

import pytest
from chat_shapes import TEMPLATES, byte_level, sentencepiece_like, tokenizer_of

from tunesmith.chat.renderer import Renderer
from tunesmith.errors import InputError

QUESTION = [{"role": "user", "content": "the lazy dog?"}]
TURN = [*QUESTION, {"role": "assistant", "content": "Yes."}]
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '</tools><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>\n' }}"
    '{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}'
    "{{ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "capital", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "capital", "arguments": '{"of": "France"}'}}


def with_template(family: str, template: str | dict[str, str] | None) -> Renderer:
    tokenizer = byte_level(family)
    tokenizer.chat_template = template
    return Renderer.from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    "make", [lambda: byte_level("chatml"), lambda: byte_level("llama3"), lambda: sentencepiece_like("mistral")]
)
def test_a_base_without_a_template_gets_a_plain_one_that_stops(make) -> None:
    tokenizer = make()
    renderer = Renderer.from_tokenizer(tokenizer)
    assert not renderer.has_template
    assert any("no chat template" in note for note in renderer.notes)
    [(ids, weights)] = renderer.chat_example([*TURN, *TURN])
    assert ids.count(tokenizer.eos_token_id) == 2
    assert ids[-1] == renderer.stop_id == tokenizer.eos_token_id
    assert weights[-1] == 1.0
    turn = "### User:\nthe lazy dog?\n\n### Assistant:\nYes."
    said = renderer.decode(ids)
    # SentencePiece of this age reads a space into the text after a special token
    assert said.replace("Yes. ", "Yes.") == f"{turn}\n\n{turn}"
    if tokenizer.bos_token_id is not None:
        assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)


def test_the_installed_template_is_the_same_everywhere() -> None:
    first, second = (Renderer.from_tokenizer(byte_level("chatml")) for _ in range(2))
    assert (first.template, first.template_hash) == (second.template, second.template_hash)
    tokenizer = byte_level("chatml")
    stored = Renderer.from_tokenizer(tokenizer, template=first.template)
    assert stored.prompt_ids(QUESTION) == first.prompt_ids(QUESTION)
    tokenizer.chat_template = first.template  # as another server would use it
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False) == (
        first.prompt_ids(QUESTION)
    )


def test_a_system_prompt_is_folded_where_there_is_no_system_turn() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("gemma"), default_system="Be quick.")
    assert "<start_of_turn>user\nBe quick.\n\nthe lazy dog?<end_of_turn>" in "".join(
        renderer.pieces(renderer.prompt_ids(QUESTION))
    )
    assert any("no system turn" in note for note in renderer.notes)
    silent = with_template(
        "chatml",
        TEMPLATES["chatml"].replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
    )
    assert "Be quick." in silent.decode(silent.prompt_ids([{"role": "system", "content": "Be quick."}, *QUESTION]))


def test_what_a_template_refuses_is_a_sentence() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("gemma"))
    with pytest.raises(InputError, match="Roles must alternate"):
        renderer.prompt_ids([*QUESTION, *QUESTION])
    with pytest.raises(InputError, match="refuses these messages"):
        with_template("chatml", "{% for m in messages %}{{ m['content'] }").prompt_ids(QUESTION)


def test_a_template_cannot_reach_outside() -> None:
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match="refuses"):
        with_template("chatml", hostile).prompt_ids(QUESTION)


def test_a_developer_turn_is_a_system_turn_where_there_is_none() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("chatml"))
    developer, system = ([{"role": role, "content": "Be quick."}, *QUESTION] for role in ("developer", "system"))
    assert renderer.prompt_ids(developer) == renderer.prompt_ids(system)


def test_content_in_parts_is_joined_and_pictures_are_refused() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("chatml"))
    parts = [{"type": "text", "text": "the lazy"}, {"type": "text", "text": " dog?"}]
    assert renderer.prompt_ids([{"role": "user", "content": parts}]) == renderer.prompt_ids(QUESTION)
    with pytest.raises(InputError, match="must be text"):
        renderer.prompt_ids([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_tools_and_calls_are_rendered_and_read_back() -> None:
    renderer = with_template("chatml", HERMES)
    assert '"name": "capital"' in renderer.decode(renderer.prompt_ids(QUESTION, [TOOL]))
    calls = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    [(ids, weights)] = renderer.chat_example(calls, [TOOL])
    said = [token for token, weight in zip(ids, weights, strict=True) if weight]
    assert renderer.decode(said) == '<tool_call>\n{"name": "capital", "arguments": {"of": "France"}}\n</tool_call>'
    message = renderer.parse(said)
    assert message["content"] is None
    assert [call["function"] for call in message["tool_calls"]] == [CALL["function"]]
    assert message == renderer.parse(said)


def test_tools_a_template_cannot_show_are_refused() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("chatml"))
    with pytest.raises(InputError, match="no place for tools"):
        renderer.prompt_ids(QUESTION, [TOOL])
    with pytest.raises(InputError, match='"capital" could not be learned'):
        renderer.chat_example([*QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}])


def test_todays_date_never_changes_a_prompt() -> None:
    renderer = with_template("chatml", "{{ strftime_now('%d %b %Y') }}" + TEMPLATES["chatml"])
    assert renderer.decode(renderer.prompt_ids(QUESTION)).startswith("26 Jul 2024")
    assert any("date" in note for note in renderer.notes)


def test_a_missing_generation_prompt_is_filled_in() -> None:
    renderer = Renderer.from_tokenizer(tokenizer_of("chatml-without-generation-prompt"))
    assert renderer.prompt_ids(QUESTION) == Renderer.from_tokenizer(tokenizer_of("chatml")).prompt_ids(QUESTION)
    assert any("generation prompt" in note for note in renderer.notes)
    mistral = Renderer.from_tokenizer(tokenizer_of("mistral"))
    assert not any("generation prompt" in note for note in mistral.notes)


def test_of_several_named_templates_the_default_is_used() -> None:
    renderer = with_template("chatml", {"default": TEMPLATES["chatml"], "tool_use": HERMES})
    assert renderer.template == TEMPLATES["chatml"]


def test_training_weights_never_reach_the_template() -> None:
    renderer = with_template("chatml", "{% for m in messages %}{{ m | tojson }}{% endfor %}")
    assert "weight" not in renderer.decode(renderer.prompt_ids([{**TURN[0], "weight": 1}, {**TURN[1], "weight": 0}]))


PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [PARTS, PARTS.replace("{% if part['type'] == 'text' %}", "{% if true %}")])
def test_a_template_that_reads_only_parts_is_given_parts(template) -> None:
    renderer, plain = with_template("chatml", template), Renderer.from_tokenizer(tokenizer_of("chatml"))
    system = [{"role": "system", "content": "Be quick."}, *TURN]
    assert renderer.chat_example(system) == plain.chat_example(system)
    assert renderer.notes == ()


def test_an_answer_that_a_template_leaves_out_is_a_sentence() -> None:
    silent = TEMPLATES["chatml"].replace("m['content']", "(m['content'] if m['role'] == 'user' else '')")
    with pytest.raises(InputError, match=r'leaves out an answer that ends in "Yes\."'):
        with_template("chatml", silent).chat_example(TURN)
