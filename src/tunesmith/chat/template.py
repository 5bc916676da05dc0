"""Chat templates: from messages to text. Jinja runs in transformers' sandbox; a template is data, never code.

What differs between templates is found by rendering, never by names: whether one takes a system prompt, what stands
after an answer, whether it asks for the date.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from tunesmith.errors import InputError
from tunesmith.types import Message

# Installed where a base has none. Ordinary text and the tokenizer's own end-of-text token, so any base can learn it.
PLAIN = (
    "{%- if tools %}{{ raise_exception('the plain template has no place for tools') }}{% endif -%}"
    "{{- bos_token if starts_with_bos else '' -}}"
    "{%- for message in messages -%}"
    "{{- '### ' + message['role'] | capitalize + ':\n' + message['content'] -}}"
    "{{- (eos_token if message['role'] == 'assistant' else '') + '\n\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Assistant:\n' -}}{%- endif -%}"
)
# The common one (OpenAI's), for a base that may get new tokens: each turn opens and ends in a token of its own.
CHATML = (
    "{%- if tools %}{{ raise_exception('this template has no place for tools') }}{% endif -%}"
    "{{- bos_token if starts_with_bos else '' -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")
# Templates that print today's date get this one (the date Llama 3's own template falls back to): a prompt that changes
# overnight would neither train twice to the same bytes nor serve what was proved. The macro hides transformers' clock.
DATE = datetime.datetime(2024, 7, 26)
FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{code}', '{DATE.strftime('%' + code)}')" for code in "YmdBbeAajyHMSp")
    + " }}{%- endmacro -%}"
)
PROBE_SYSTEM, PROBE_USER, PROBE_ANSWER = "Qsystemq", "Quserq", "Qanswerq"
RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


class Template:
    """A tokenizer's chat template, with what rendering it reveals.

    source       the Jinja text
    installed    the base had none, so the plain one was installed
    in_parts     the template reads content as a list of parts, as those of models that also see pictures do
    folds_system the template has no system turn: a system prompt opens the first user turn instead
    opening      what opens an answer, where the template leaves that out of its generation prompt; else ""
    tail         the text it puts after an answer, such as "<|im_end|>\\n"; None where that could not be found
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str | None = None) -> None:
        own = source or own_template(tokenizer)
        self._tokenizer = tokenizer
        self.in_parts = False
        self.installed = own is None
        self.source = own if own is not None else plain_template(tokenizer)
        self.hash = hashlib.sha256(self.source.encode()).hexdigest()
        self.in_parts = self._reads_parts_only()
        self.folds_system = self._drops_system()
        self.opening, self.tail = self._around_an_answer()

    def text(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, prompt: bool) -> str:
        """Messages as text; `prompt` adds what opens the assistant's turn. Raises InputError if it refuses them."""
        if tools and "tools" not in self.source:
            raise InputError("the base's chat template has no place for tools; leave them out, or choose another base")
        try:
            return self._render(self._prepare(messages), tools, prompt) + (self.opening if prompt else "")
        except RENDER_ERRORS as error:
            raise InputError(f"the base's chat template refuses these messages: {error}") from None

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]], prompt: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            [_as_parts(message) if self.in_parts else dict(message) for message in messages],
            tools=list(tools) or None,
            chat_template=FIXED_CLOCK + self.source if "strftime_now" in self.source else self.source,
            add_generation_prompt=prompt,
            tokenize=False,
        )
        assert isinstance(text, str)
        return text

    def _prepare(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as templates expect them."""
        prepared = [_plain_message(message) for message in messages]
        if "developer" not in self.source:
            for message in prepared:
                message["role"] = "system" if message["role"] == "developer" else message["role"]
        return _fold_system(prepared) if self.folds_system else prepared

    def _reads_parts_only(self) -> bool:
        """Whether plain text content is dropped or refused where a list of parts is printed."""
        question = [{"role": "user", "content": PROBE_USER}]
        if self._prints(question, PROBE_USER):
            return False
        self.in_parts = True
        return self._prints(question, PROBE_USER)

    def _drops_system(self) -> bool:
        turns = [{"role": "system", "content": PROBE_SYSTEM}, {"role": "user", "content": PROBE_USER}]
        return not self._prints(turns, PROBE_SYSTEM) and self._prints(turns[1:], PROBE_USER)

    def _prints(self, messages: Sequence[Mapping[str, Any]], text: str) -> bool:
        try:
            return text in self._render(messages, (), True)
        except RENDER_ERRORS:
            return False

    def _around_an_answer(self) -> tuple[str, str | None]:
        user, assistant = {"role": "user", "content": PROBE_USER}, {"role": "assistant", "content": PROBE_ANSWER}
        try:
            question, prompt = self._render([user], (), False), self._render([user], (), True)
            before, found, tail = self._render([user, assistant], (), False).rpartition(PROBE_ANSWER)
        except RENDER_ERRORS:
            return "", None
        if not found:
            return "", None
        # A space before the answer belongs to its first word; anything more is the head of the turn.
        has_head = prompt == question and before.startswith(question) and before[len(question) :].strip()
        return before[len(question) :].rstrip(" ") if has_head else "", tail


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template a tokenizer came with; of several named ones, the default."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template or None


def template_to_install(tokenizer: PreTrainedTokenizerBase, asked: str | None) -> str | None:
    """The template that a recipe's `base.chat_template` gives a base; None where it keeps its own.

    `asked` is chatml, plain or a file; null is ChatML where the base has none. Raises InputError.
    """
    if asked is None:
        return None if own_template(tokenizer) else _for_this_bos(CHATML, tokenizer)
    if asked in ("chatml", "plain"):
        return _for_this_bos(CHATML if asked == "chatml" else PLAIN, tokenizer)
    path = Path(asked)
    try:
        source = path.read_text(encoding="utf-8")
        jinja2.Environment().parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"this is no chat template: {error.message}", file=path, line=error.lineno) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the chat template cannot be read ({error}); base.chat_template is chatml, plain or a file of Jinja",
            file=path,
        ) from None
    return source


def special_tokens(source: str) -> list[str]:
    """The special tokens that stand in a template, each once: whatever looks like `<|im_end|>`."""
    return list(dict.fromkeys(SPECIAL.findall(source)))


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """`### User:` and `### Assistant:` in ordinary text, answers ending in the tokenizer's end-of-text token."""
    return _for_this_bos(PLAIN, tokenizer)


def _for_this_bos(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    first = tokenizer("x", verbose=False)["input_ids"][:1]
    starts_with_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return source.replace("starts_with_bos", "true" if starts_with_bos else "false")


def _plain_message(message: Message) -> dict[str, Any]:
    """Without training weights; text content as one string; tool arguments as objects, as templates print them."""
    plain: dict[str, Any] = {key: value for key, value in message.items() if key not in ("weight", "content")}
    plain["content"] = content_text(message)
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def content_text(message: Message) -> str:
    """A message's text: none is empty, parts are joined. Raises InputError for pictures, sound and files."""
    content: Any = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise InputError("a message's content must be text; this base reads no pictures, sound or files")


def _as_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put leading system turns at the head of the first user turn."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count == 0 or count == len(messages) or messages[count]["role"] != "user":
        return messages
    opening = "\n\n".join(message["content"] for message in messages[: count + 1])
    return [{**messages[count], "content": opening}, *messages[count + 1 :]]
