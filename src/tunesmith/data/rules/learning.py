"""Will the rows, as the model sees them, teach what they are meant to?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from tunesmith.data import wording
from tunesmith.data.likeness import normalise
from tunesmith.data.material import Material, Note
from tunesmith.data.private import quote
from tunesmith.data.tokenize import Rendered, longest, render
from tunesmith.errors import InputError
from tunesmith.types import Example, Message, Source

SAMPLED = 64  # rows rendered for what a template does to all rows alike
MOST_LONG = 300  # rows rendered in the search for those over the limit, longest first
MOSTLY = 0.5  # share of rows with one answer from which that is worth a word
IMBALANCE = 10  # the most frequent label over the least frequent one


def no_supervised_token(material: Material) -> Iterator[Note]:
    """Rows whose every assistant turn has weight 0. (Rows that render to none are refused when they are tokenised.)"""
    if material.data.train_on == "all":
        return
    last_only = material.data.train_on == "last"
    idle = [row.source for row in material.rows if row.kind == "chat" and not _trains(row, last_only)]
    if idle:
        reason = f"{wording.rows(idle)} train nothing: every assistant message that would be trained has weight 0"
        yield Note("no-supervised-token", "block", reason, "give one weight 1, or remove the row", idle, remove=idle)


def _trains(row: Example, last_only: bool) -> bool:
    turns = [message for message in row.messages if message["role"] == "assistant"]
    return any(message.get("weight", 1) for message in (turns[-1:] if last_only else turns))


def rendering(material: Material) -> Iterator[Note]:
    """What this base's template does to a sample of the rows."""
    if material.renderer is None:
        return
    faults: dict[str, list[Source]] = {}
    refused: list[tuple[Source, str]] = []
    step = max(1, len(material.rows) // SAMPLED)
    for row in islice(material.rows, 0, None, step):
        try:
            rendered = render(row, material.renderer, material.data.train_on)
            for rule in _faults(row, rendered, material):
                faults.setdefault(rule, []).append(row.source)
        except InputError as error:
            refused.append((row.source, error.reason))
    for rule, sources in faults.items():
        severity, reason, remedy = RENDERING[rule]
        yield Note(rule, severity, f"{reason} ({len(sources)} of the rows looked at)", remedy, sources)
    if refused:
        sources = [source for source, _ in refused]
        remedy = "mend the rows, or choose a base whose template takes them"
        yield Note("template-refuses", "block", f"{wording.rows(sources)} looked at: {refused[0][1]}", remedy, sources)


RENDERING: dict[str, tuple[Literal["block", "warn"], str, str]] = {
    "stop-not-supervised": (
        "block",
        "no trained answer ends in a token the engine stops at, so the model would learn never to stop",
        "choose a base whose chat template ends its turns, or add the stop token to the answers",
    ),
    "prompt-not-prefix": (
        "warn",
        "this base's template prints a finished turn differently from the prompt it is answered to; each answer is "
        "trained right behind the prompt the engine is given, and earlier turns as the template prints them",
        "nothing need be done; a base without such a template makes longer examples",
    ),
    "double-bos": (
        "warn",
        "the text begins with the begin-of-text token twice",
        "remove the token from the rows or from the template",
    ),
}


def _faults(row: Example, rendered: Sequence[Rendered], material: Material) -> Iterator[str]:
    renderer = material.renderer
    assert renderer is not None
    ids, weights = rendered[-1]
    trained = [token for token, weight in zip(ids, weights, strict=True) if weight > 0]
    if trained and trained[-1] not in renderer.stop_ids:
        yield "stop-not-supervised"
    if len(ids) > 1 and ids[0] == ids[1] and not renderer.decode(ids[:1]):
        yield "double-bos"
    if row.kind == "chat":
        prompt = renderer.prompt_ids(row.messages[:-1], row.tools)
        again: Message = {"role": "user", "content": "?"}
        later = renderer.prompt_ids([*row.messages, again], row.tools)
        if later[: len(prompt)] != prompt:
            yield "prompt-not-prefix"


def over_limit(material: Material) -> Iterator[Note]:
    """Rows longer than the limit, and what `on_long` will do to them."""
    renderer, limit = material.renderer, material.limit
    if renderer is None or limit is None:
        return
    sizes = [(_bytes(row), number) for number, row in enumerate(material.rows)]
    # A token stands for at least one byte, or is one of the few that a template adds.
    suspects = sorted(
        (pair for pair in sizes if pair[0] + len(material.rows[pair[1]].messages) * 16 > limit), reverse=True
    )
    over: list[tuple[int, Source]] = []
    for _, number in suspects[:MOST_LONG]:
        row = material.rows[number]
        try:
            length = longest(render(row, renderer, material.data.train_on))
        except InputError:
            continue
        if length > limit:
            over.append((length, row.source))
    if not over:
        return
    what = {"error": "training refuses them", "drop": "they are left out"}.get(
        material.data.on_long, "they lose the start of what is asked, never the answer"
    )
    more = "at least " if len(suspects) > MOST_LONG else ""
    sources = sorted((source for _, source in over), key=lambda source: (source.file, source.line))
    reason = f"{more}{wording.rows(sources)} are longer than {limit:,} tokens (the longest {max(over)[0]:,}); {what}"
    severity = "block" if material.data.on_long == "error" else "warn"
    remedy = "shorten them, raise max_seq_len, or set on_long to drop or truncate"
    yield Note("over-limit", severity, reason, remedy, sources, remove=sources)


def _bytes(row: Example) -> int:
    messages = row.messages + row.chosen + row.rejected
    texts = [row.prompt, row.completion, row.text, *(message.get("content") for message in messages)]
    calls = sum(len(str(message.get("tool_calls", ""))) for message in messages)
    size = sum(len(text) if text.isascii() else len(text.encode("utf-8", "replace")) for text in texts if text)
    return size + calls + (2 * len(str(row.tools)) if row.tools else 0)


def same_answer(material: Material) -> Iterator[Note]:
    """One answer for most rows, in a task that is not one of labels."""
    answers = Counter(normalise(answer) for answer in material.answers)
    if len(material.rows) < SAMPLED // 8 or (material.labels is not None and len(answers) > 1):
        return
    answer, count = max(answers.items(), key=lambda pair: pair[1])
    if answer and count >= MOSTLY * len(material.rows):
        sources = [
            row.source for row, said in zip(material.rows, material.answers, strict=True) if normalise(said) == answer
        ]
        reason = f"{count:,} of {len(material.rows):,} rows have the same answer, {quote(answer)}"
        yield Note("same-answer", "warn", reason, "make sure that the answers depend on the inputs", sources)


def label_counts(material: Material) -> Iterator[Note]:
    """Labels with one example, very uneven labels, and labels that differ in spelling only."""
    if material.labels is None:
        return
    counts = Counter(material.labels)
    single = sorted(label for label, count in counts.items() if count == 1)
    if single:
        sources = material.with_labels(single)
        names = ", ".join(map(quote, single[:5]))
        reason = f"{wording.count(len(single), 'label')} with one example only: {names}"
        yield Note("label-with-one-example", "warn", reason, "add examples, or merge the label with another", sources)
    (often, most), (seldom, fewest) = counts.most_common(1)[0], counts.most_common()[-1]
    if most >= IMBALANCE * fewest:
        reason = f"the label {quote(often)} has {most:,} examples and {quote(seldom)} has {fewest:,}"
        remedy = "add examples of the rare labels, and look at the score of each label"
        yield Note("class-imbalance", "warn", reason, remedy, material.with_labels([seldom]))
    spellings: dict[str, list[str]] = {}
    for label in counts:
        spellings.setdefault(normalise(label).replace("_", " ").replace("-", " "), []).append(label)
    for variants in spellings.values():
        usual, *others = sorted(variants, key=lambda label: -counts[label])
        if others:
            reason = f"the label {quote(usual)} is also written {', '.join(map(quote, others))}"
            yield Note("label-spelling", "warn", reason, "write each label one way", material.with_labels(others))
