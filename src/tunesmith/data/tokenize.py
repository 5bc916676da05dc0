"""From examples to token ids and weights, built together by the one renderer."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tunesmith.data import wording
from tunesmith.data.lazy import Lazy, picked
from tunesmith.data.minhash import Labels
from tunesmith.data.parts import STANDING_ROLES
from tunesmith.data.stored import content_of
from tunesmith.data.tokens import WHOLE, Made, remembered
from tunesmith.errors import InputError
from tunesmith.recipe import Data
from tunesmith.types import Example, Message, Source, TokenizedExample

if TYPE_CHECKING:
    from tunesmith.chat.renderer import Renderer, TrainOn

Rendered = tuple[Sequence[int], Sequence[float]]  # ids and weights


@dataclass(frozen=True)
class Tokenized:
    """Rows as the model will see them, and what `data.on_long` did to the rows over the limit.

    `rows`: the row each sequence was made from, -1 for one that is mixed in. [sequences]
    `together`: so many consecutive sequences are one example: a preference's chosen answer, then its rejected one.
    """

    examples: Sequence[TokenizedExample]
    rows: Labels
    dropped: Sequence[Source]
    truncated: Sequence[Source]
    lost_answers: int  # earlier assistant turns that truncation cut off together with their questions
    together: int = 1

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def supervised_tokens(self) -> int:
        return sum(int(np.count_nonzero(example.weights)) for example in self.examples)

    def sentences(self, limit: int) -> list[str]:
        """What the person must be told: nothing where no row was over the limit."""
        said = []
        if self.dropped:
            left_out = wording.rows(self.dropped)
            said.append(f"{left_out} longer than {limit} tokens were left out: {wording.places(self.dropped)}")
        if self.truncated:
            turns = wording.count(self.lost_answers, "earlier answer")
            lost = f"; {turns} went with their questions" if self.lost_answers else ""
            said.append(
                f"{wording.rows(self.truncated)} longer than {limit} tokens were cut, questions at their start and "
                f"texts at their end, never an answer{lost}: {wording.places(self.truncated)}"
            )
        return said


def tokenize(
    examples: Sequence[Example],
    renderer: Renderer,
    data: Data,
    limit: int,
    *,
    pieces: bool = False,
    strangers: bool = False,
) -> Tokenized:
    """Render every example; none of the results is longer than `limit` tokens. Raises InputError.

    Over the limit, `data.on_long` decides. "error" refuses. "drop" leaves the row out. "truncate" takes away the
    oldest exchanges of a conversation, then the start of the longest question (or plain prompt), as little as is
    needed; the last answer is never cut, and a row whose answer alone is too long is refused. A text row keeps its
    first `limit` tokens. A row without any supervised token is an error. A preference row gives two sequences, its
    prompt and each of the answers. With `pieces` a text over the limit is as many sequences as it takes instead;
    with `strangers` a preference has a third one, its prompt with the next row's chosen answer, cut to the limit.
    """
    how = {"limit": limit, "train_on": data.train_on, "on_long": data.on_long, "pieces": pieces}
    key = _key(examples, renderer, how)
    found = remembered(key, lambda: _sequences(examples, renderer, data, limit, pieces=pieces))
    left = np.zeros(len(examples), np.int8)
    left[found.rows] = 1
    cut, at = np.unique(found.rows[found.lost != WHOLE], return_index=True)
    lost = int(found.lost[found.lost != WHOLE][at].sum())
    dropped, truncated = (_sources(examples, which) for which in (np.flatnonzero(left == 0), cut))
    together = 2 if examples[0].kind == "preference" else 1
    if strangers:
        triples = _with_strangers(found.sequences, limit)
        return Tokenized(triples, np.repeat(found.rows[::2], 3), dropped, truncated, lost, 3)
    return Tokenized(found.sequences, found.rows, dropped, truncated, lost, together)


def _sequences(
    examples: Sequence[Example], renderer: Renderer, data: Data, limit: int, *, pieces: bool
) -> Iterator[Made]:
    """Every example's sequences, one example after the other; what is wrong with some is raised at the end."""
    too_long, untaught = array("q"), array("q")
    first_length, found = 0, False
    for row, example in enumerate(examples):
        rendered, lost = render(example, renderer, data.train_on), WHOLE
        if pieces:
            rendered = [piece for ids, weights in rendered for piece in _pieces(ids, weights, limit)]
        length = longest(rendered)
        if length > limit and data.on_long == "error":
            first_length = first_length or length
            too_long.append(row)
        if length > limit and data.on_long != "truncate":
            continue
        if length > limit:
            rendered, lost = _truncate(example, renderer, data, limit)
        for ids, weights in rendered:
            if not any(weights) and (not untaught or untaught[-1] != row):
                untaught.append(row)
            found = True
            yield Made(
                TokenizedExample(example.id, np.asarray(ids, np.int32), np.asarray(weights, np.float32)), row, lost
            )
    _refuse_too_long(_sources(examples, too_long), first_length, limit)
    _refuse_untaught(_sources(examples, untaught))
    if not found:
        raise InputError(f"every row is longer than {limit} tokens, so none is left to train on; raise max_seq_len")


def _sources(examples: Sequence[Example], rows: Labels | array[int]) -> Sequence[Source]:
    some = picked(examples, np.asarray(rows, np.int64))
    return Lazy(len(some), lambda i: some[i].source)


def _key(examples: Sequence[Example], renderer: Renderer, how: dict[str, Any]) -> str | None:
    """All that decides the sequences, as a hash: rows in their order, tokenizer, template, options, this program."""
    speaks = renderer.fingerprint
    if speaks is None:
        return None
    digest = hashlib.sha256(json.dumps([_program(), speaks, how]).encode())
    for example in examples:
        digest.update(f"{example.id} {example.kind} {content_of(example, columns=False)}\n".encode())
    return digest.hexdigest()


@cache
def _program() -> str:
    """A hash of the code that makes token ids of rows, so that another version never takes what this one made."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *(here.parent / "chat").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def render(example: Example, renderer: Renderer, train_on: TrainOn) -> list[Rendered]:
    """One example through the renderer: usually one result, one a trained turn where turns don't nest.

    Raises InputError with the row's place, also where the chat template refuses the row.
    """
    try:
        return _render(example, renderer, train_on)
    except InputError as error:
        raise InputError(error.reason, file=example.source.file, line=example.source.line) from None


def _render(example: Example, renderer: Renderer, train_on: TrainOn) -> list[Rendered]:
    if example.kind == "chat":
        return [*renderer.chat_example(example.messages, example.tools, train_on=train_on)]
    if example.kind == "input":
        ids = renderer.prompt_ids(example.messages, list(example.tools))
        return [(ids, [0.0] * len(ids))]
    if example.kind == "completion":
        assert example.prompt is not None
        assert example.completion is not None
        return [renderer.completion_example(example.prompt, example.completion)]
    if example.kind == "text":
        assert example.text is not None
        return [renderer.text_example(example.text)]
    return [_continued(example, answer, renderer, train_on) for answer in (example.chosen, example.rejected)]


def _continued(example: Example, answer: tuple[Message, ...], renderer: Renderer, train_on: TrainOn) -> Rendered:
    """A preference's prompt and one of its two answers, of which the answer alone is trained."""
    asked = [cast(Message, {**turn, "weight": 0}) if turn["role"] == "assistant" else turn for turn in example.messages]
    wanted: TrainOn = "last" if train_on == "last" else "assistant"
    found = renderer.chat_example((*asked, *answer), example.tools, train_on=wanted)
    if len(found) > 1:
        raise InputError(
            "the base's chat template prints earlier turns differently, so an answer of several turns is not one "
            "sequence; end chosen and rejected after their first turn"
        )
    return found[0]


def _with_strangers(found: Sequence[TokenizedExample], limit: int) -> Lazy[TokenizedExample]:
    """Chosen, rejected, ... -> chosen, rejected, stranger, ...: the prompt with the next row's chosen answer."""

    def sequence(i: int) -> TokenizedExample:
        pair, which = divmod(i, 3)
        if which < 2:
            return found[2 * pair + which]
        chosen, other = found[2 * pair], found[2 * (pair + 1) % len(found)]
        asked, said = (int(np.flatnonzero(each.weights)[0]) for each in (chosen, other))
        ids = np.concatenate((chosen.input_ids[:asked], other.input_ids[said:]))[:limit]
        weights = np.concatenate((chosen.weights[:asked], other.weights[said:]))[:limit]
        return TokenizedExample(chosen.example_id, ids, weights)

    return Lazy(len(found) // 2 * 3, sequence)


def _pieces(ids: Sequence[int], weights: Sequence[float], limit: int) -> list[Rendered]:
    """Pieces of at most `limit` tokens; each begins with the last token of the one before: every token is learned."""
    starts = range(0, max(1, len(ids) - 1), limit - 1)
    return [(ids[i : i + limit], [0.0, *weights[i + 1 : i + limit]]) for i in starts]


def longest(rendered: Iterable[Rendered]) -> int:
    return max((len(ids) for ids, _ in rendered), default=0)


def _truncate(example: Example, renderer: Renderer, data: Data, limit: int) -> tuple[list[Rendered], int]:
    """The example rendered within the limit, and how many earlier assistant turns were lost."""
    if example.kind == "text":
        return [(ids[:limit], weights[:limit]) for ids, weights in render(example, renderer, data.train_on)], 0
    if example.kind == "completion":
        prompt, completion = example.prompt or "", example.completion or ""
        cut = _shortest_cut(prompt, lambda rest: [renderer.completion_example(rest, completion)], limit)
        return _or_refuse(cut, example, limit), 0

    def rendered(messages: tuple[Message, ...]) -> list[Rendered]:
        return render(replace(example, messages=messages), renderer, data.train_on)

    messages = example.messages
    while longest(rendered(messages)) > limit and (shorter := _without_oldest_exchange(messages)):
        messages = shorter
    lost = sum(m["role"] == "assistant" for m in example.messages) - sum(m["role"] == "assistant" for m in messages)
    asked = [i for i, m in enumerate(messages) if m["role"] in ("user", "tool")]
    if not asked or longest(rendered(messages)) <= limit:
        return _or_refuse(rendered(messages), example, limit), lost
    at = max(asked, key=lambda i: len(messages[i].get("content") or ""))

    def with_content(rest: str) -> list[Rendered]:
        turn = cast(Message, {**messages[at], "content": rest})
        return rendered((*messages[:at], turn, *messages[at + 1 :]))

    return _or_refuse(_shortest_cut(messages[at].get("content") or "", with_content, limit), example, limit), lost


def _without_oldest_exchange(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """Standing turns stay; the first user turn goes, with all that follows it up to the next. None for the last one."""
    standing = tuple(m for m in messages if m["role"] in STANDING_ROLES)
    talk = [m for m in messages if m["role"] not in STANDING_ROLES]
    later = next((i for i, m in enumerate(talk) if i > 0 and m["role"] == "user"), None)
    return None if later is None else (*standing, *talk[later:])


def _shortest_cut(text: str, rendered: Callable[[str], list[Rendered]], limit: int) -> list[Rendered]:
    """Render with as few leading characters of `text` gone as fit in the limit, found by bisection."""
    low, high = 0, len(text)  # a cut of `low` is too little
    while high - low > 1:
        middle = (low + high) // 2
        if longest(rendered(text[middle:])) > limit:
            low = middle
        else:
            high = middle
    return rendered(text[high:])


def _or_refuse(rendered: list[Rendered], example: Example, limit: int) -> list[Rendered]:
    if (length := longest(rendered)) <= limit:
        return rendered
    raise InputError(
        f"the answer does not fit: with as little before it as can be, the row has {length} tokens and the limit is "
        f"{limit}; raise max_seq_len, split the row, or use on_long: drop",
        file=example.source.file,
        line=example.source.line,
    )


def _refuse_too_long(rows: Sequence[Source], length: int, limit: int) -> None:
    """`length`: of the first of them, in tokens."""
    if not rows:
        return
    more = f" ({len(rows)} rows are over it: {wording.places(rows)})" if len(rows) > 1 else ""
    raise InputError(
        f"the row has {length} tokens and the limit is {limit}{more}; shorten it, raise max_seq_len, "
        "or set on_long to drop or truncate",
        file=rows[0].file,
        line=rows[0].line,
    )


def _refuse_untaught(rows: Sequence[Source]) -> None:
    """A sequence that trains nothing is a mistake in its row's weights or its template, never a choice."""
    if rows:
        raise InputError(
            f"no token of the row would be trained on ({wording.rows(rows)} in all: {wording.places(rows)}); "
            "give an assistant message weight 1, or remove the row",
            file=rows[0].file,
            line=rows[0].line,
        )
