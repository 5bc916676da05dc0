"""The one renderer: a training example is *defined* as the prompt the engine is given plus what must then be said.

    ids      [prompt_ids(messages before the turn)] [the answer's tokens, ending in a stop token]
    weights   0 0 0 ...                              1 1 1 ...

Three rules cover every chat template:

1. Where the prompt's text opens the finished turn's text (most templates), the answer is what stands after it, cut
   after the token that ends the turn. Both are tokenised together if the prompt's ids open the result, else apart:
   what counts is that the sequence starts with exactly the ids the engine is given.
2. Where it does not (templates whose prompt opens a <think> block that the finished turn drops), the answer is its
   text as the template prints it, else its bare text; the token that ends the turn follows.
3. Where one turn's sequence opens the next turn's, they are one example with several trained spans. Where it does not
   (templates that strip the reasoning of earlier turns), each trained turn is an example of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from tunesmith.chat.parse import parse_answer
from tunesmith.chat.template import DATE, Template, content_text
from tunesmith.errors import InputError
from tunesmith.types import Message

TrainOn = Literal["assistant", "last", "all"]
Weighted = tuple[list[int], list[float]]  # token ids and, for each, the loss weight of predicting it


class Renderer:
    """Messages and texts to token ids and back, for one tokenizer.

    stop_id    the token every chat answer is trained to end in
    eos_id     the token every completion and text is trained to end in
    stop_ids   all tokens at which generation ends: both, and those the base itself names
    notes      sentences for the person about what this base's template made necessary
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        default_system: str | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:
        eos_id = tokenizer.eos_token_id
        if not isinstance(eos_id, int):
            raise InputError(
                "the base's tokenizer has no end-of-text token, so a tuned model could never stop; "
                "name one as eos_token in its tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self._backend = _whole_texts(tokenizer)
        self._template = template
        self._default_system = default_system
        self._before, self._joins_with_space = _habits(tokenizer)
        self.eos_id = eos_id
        end, self._ends_in_tail = self._end_of_turn()
        self.stop_id = self.eos_id if end is None else end
        self.stop_ids = frozenset({self.stop_id, self.eos_id, *stop_ids})
        self.notes = self._notes()

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        default_system: str | None = None,
        template: str | None = None,
        stop_ids: Iterable[int] = (),
    ) -> Renderer:
        """`template` overrides the tokenizer's own; where there is none at all, a plain-text one is installed.

        `stop_ids` are further tokens at which the base ends its answers (`LoadedBase.stop_ids`). Raises InputError.
        """
        return cls(tokenizer, Template(tokenizer, template), default_system=default_system, stop_ids=stop_ids)

    @property
    def has_template(self) -> bool:
        """Whether the base came with a chat template of its own."""
        return not self._template.installed

    @property
    def template(self) -> str:
        """The Jinja text in use, own or installed."""
        return self._template.source

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template's text."""
        return self._template.hash

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of all that decides which ids a text becomes; None for a tokenizer that can't be written out."""
        if self._backend is None:
            return None
        versions = [version(name) for name in ("tokenizers", "transformers", "jinja2")]
        marks = [str(self._tokenizer.special_tokens_map), self._tokenizer.split_special_tokens, sorted(self.stop_ids)]
        facts = [self._backend.to_str(), marks, versions, self.template, self._default_system]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 .. vocab_size - 1; the model's head may have more rows."""
        return len(self._tokenizer)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """What the engine is given so that it answers `messages`. Raises InputError where the template refuses them."""
        return self._encode(self._template.text(self._with_system(messages), tools, prompt=True))

    def completion_prompt_ids(self, prompt: str) -> list[int]:
        """A plain prompt, opened by the tokenizer's own special tokens (once, also where the text brings them)."""
        ids = self._encode(prompt)
        return ids if self._before and ids[: len(self._before)] == self._before else self._before + ids

    def chat_example(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), train_on: TrainOn = "assistant"
    ) -> list[Weighted]:
        """A conversation as training sequences: one, or one for each trained turn where turns do not nest.

        `train_on`: every assistant turn, the last one, or all tokens. A message's weight 0 keeps its turn out.
        """
        messages = self._with_system(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise InputError("there is no assistant turn to learn from; a chat row must end with one")
        if train_on == "all":
            return [self._everything(messages, tools, turns)]
        wanted = turns if train_on == "assistant" else turns[-1:]
        trained = [turn for turn in wanted if messages[turn].get("weight", 1) != 0]
        sequences = [_weighted(*self._turn(messages, turn, tools)) for turn in trained]
        if not sequences:
            prompt, answer = self._turn(messages, turns[-1], tools)
            return [(prompt + answer, [0.0] * (len(prompt) + len(answer)))]
        return _join_nested(sequences)

    def completion_example(self, prompt: str, completion: str) -> Weighted:
        """A plain prompt and its completion, ending in the end-of-text token."""
        return _weighted(self.completion_prompt_ids(prompt), self._ended(self._encode_after(completion)))

    def text_example(self, text: str) -> Weighted:
        """A whole text, every token trained, ending in the end-of-text token."""
        return _weighted([], self._ended(self.completion_prompt_ids(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._text(ids, skip_special=True)

    def parse(self, ids: Sequence[int]) -> Message:
        """An answer's tokens as an assistant message, tool calls taken out of its text."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return parse_answer(raw=self._text(ids[:end], skip_special=False), text=self.decode(ids[:end]))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text each token adds, special tokens included; together they are the whole text.

        A character spread over several tokens stands with the last of them.
        """
        pieces: list[str] = []
        settled = [0]  # the ends of tokens at which no character is open
        for end in range(1, len(ids) + 1):
            done, start = settled[-1], settled[-8:][0]  # a few tokens of context, from where no character is cut
            before, after = (self._text(ids[start:stop], skip_special=False) for stop in (done, end))
            if after.endswith("\ufffd") and end < len(ids) and end - done < 4:  # UTF-8 has at most 4 bytes
                pieces.append("")
                continue
            pieces.append(after[len(before) :])
            settled.append(end)
        return pieces

    def _everything(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], turns: list[int]) -> Weighted:
        prompt, answer = self._turn(messages, turns[-1], tools)
        ids, weights = _weighted([], prompt + answer)
        for turn in turns:
            if messages[turn].get("weight", 1) != 0:
                continue
            before, said = self._turn(messages, turn, tools)
            if ids[: len(before) + len(said)] != before + said:
                raise InputError(
                    'a turn with "weight": 0 cannot be kept out under train_on: all, because this base\'s template '
                    "prints earlier turns differently; use train_on: assistant"
                )
            weights[len(before) : len(before) + len(said)] = [0.0] * len(said)
        return ids, weights

    def _turn(
        self, messages: Sequence[Message], turn: int, tools: Sequence[dict[str, Any]]
    ) -> tuple[list[int], list[int]]:
        """(the ids the engine would be given before a turn, the ids of what the model must say in it)"""
        prompt = self._template.text(messages[:turn], tools, prompt=True)
        finished = self._template.text(messages[: turn + 1], tools, prompt=False)
        if not self._ends_in_tail:  # ordinary text closes the turn: the stop token takes its place
            finished = finished.removesuffix(self._template.tail or "")
        prompt_ids = self._encode(prompt)
        if finished.startswith(prompt):
            said, ids = finished[len(prompt) :], self._encode(finished)
            joined = ids[: len(prompt_ids)] == prompt_ids
            answer = ids[len(prompt_ids) :] if joined else self._encode_after(said)
        else:
            said = answer_text(messages[turn], prompt, finished)
            answer = self._encode_after(said)
        _check_said(messages[turn], said)
        return prompt_ids, self._cut(answer) if finished.endswith(said) else [*answer, self.stop_id]

    def _cut(self, answer: list[int]) -> list[int]:
        """End an answer with the token that ends the turn; what a template prints after it is nobody's to say."""
        ends = [i for i, token in enumerate(answer) if token == self.stop_id]
        if self._ends_in_tail and len(ends) >= self._ends_in_tail:
            return answer[: ends[-self._ends_in_tail] + 1]
        others = [i for i, token in enumerate(answer) if token in self.stop_ids]
        if others and not self.decode(answer[others[-1] :]).strip():
            return answer[: others[-1] + 1]  # e.g. a tool call, which some templates end in a token of its own
        return [*answer, self.stop_id]

    def _end_of_turn(self) -> tuple[int | None, int]:
        """The token the template ends an answer with, and how often it stands in what follows an answer."""
        added = {token for token, text in self._tokenizer.added_tokens_decoder.items() if str(text).strip()}
        tail = self._encode(self._template.tail or "")
        end = next((token for token in tail if token in added or token == self.eos_id), None)
        return end, 0 if end is None else tail.count(end)

    def _notes(self) -> tuple[str, ...]:
        template, notes = self._template, []
        if template.installed:
            notes.append("the base has no chat template; the plain one (### User: / ### Assistant:) was installed")
        if template.folds_system:
            notes.append(
                "the base's chat template has no system turn; a system prompt opens the first user turn instead"
            )
        if template.opening:
            notes.append(f"the base's chat template has no generation prompt; {template.opening!r} opens every answer")
        if not self._ends_in_tail:
            notes.append(
                "the base's chat template ends no turn in a token; answers end in the end-of-text token instead"
            )
        if "strftime_now" in template.source:
            notes.append(f"the base's chat template prints today's date; it is always given {DATE:%d %b %Y}")
        return tuple(notes)

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self._default_system is None or any(message["role"] in ("system", "developer") for message in messages):
            return messages
        return [{"role": "system", "content": self._default_system}, *messages]

    def _encode(self, text: str) -> list[int]:
        if self._backend is None:
            return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encode_after(self, text: str) -> list[int]:
        """Tokens of a text that follows other text: SentencePiece puts a space before a text only at its very start."""
        if self._joins_with_space:
            anchor, ids = self._encode("\n"), self._encode("\n" + text)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self._encode(text)

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id]

    def _text(self, ids: Sequence[int], *, skip_special: bool) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _whole_texts(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Rust tokenizer inside, where there is one, set to cut and fill up nothing, as transformers sets it for a call
    without options; asked directly it takes half the time. None where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def answer_text(message: Message, prompt: str, finished: str) -> str:
    """What the model must say after a prompt that does not open the finished turn (rule 2).

    prompt    ...<|assistant|><think>\\n
    finished  ...<|assistant|>The answer.<|end|>          ->  The answer.<|end|>
    """
    parted = (i for i, (a, b) in enumerate(zip(prompt, finished, strict=False)) if a != b)
    shared = next(parted, min(len(prompt), len(finished)))
    content = content_text(message)
    for printed in (content, content.strip()):
        # The answer may itself start like the rest of the prompt, so look from a little before where the texts part.
        at = finished.find(printed, max(0, shared - len(printed))) if printed else -1
        if at >= 0:
            return finished[at:]
    if message.get("tool_calls"):
        return finished[shared:]
    return content.removeprefix(prompt[shared:])


def _check_said(message: Message, said: str) -> None:
    """Raise InputError where a template leaves out what is to be learned."""
    end = content_text(message).strip().rpartition("\n")[2][-16:]  # reasoning before it may be dropped
    if end not in said:
        raise InputError(f'the base\'s chat template leaves out an answer that ends in "{end}"')
    for call in message.get("tool_calls") or ():
        name = call.get("function", {}).get("name", "")
        if name not in said:
            raise InputError(f'the base\'s chat template does not print tool calls, so "{name}" could not be learned')


def _weighted(prompt: list[int], answer: list[int]) -> Weighted:
    """Train the answer. The first token of all has nothing before it to be predicted from."""
    ids = prompt + answer
    weights = [0.0] * len(prompt) + [1.0] * len(answer)
    return ids, [0.0, *weights[1:]]


def _join_nested(sequences: list[Weighted]) -> list[Weighted]:
    """Rule 3: a sequence that opens the next one becomes a trained span of it."""
    examples = [sequences[0]]
    for ids, weights in sequences[1:]:
        before, trained = examples[-1]
        if ids[: len(before)] == before:
            examples[-1] = ids, trained + weights[len(before) :]
        else:
            examples.append((ids, weights))
    return examples


def _habits(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """(the special tokens a tokenizer puts before a text, whether it reads a text as if a space stood before it)"""
    bare = tokenizer("x", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("x", verbose=False)["input_ids"]
    before = next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])
    return before, tokenizer.decode(bare + bare, clean_up_tokenization_spaces=False) != "xx"
