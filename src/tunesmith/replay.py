"""`data.replay`: a share of the training examples is general, answered by the base itself, so that it stays as it was.

The prompts (data/replay_prompts.txt) were written for this product and are none of those that retention is measured on.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from tunesmith.chat.renderer import Renderer
from tunesmith.data.lazy import Lazy
from tunesmith.data.tokenize import Tokenized, tokenize
from tunesmith.errors import InputError
from tunesmith.models.loading import LoadedBase
from tunesmith.progress import Reporter
from tunesmith.prove.answering import Prompt, Reply, ReplyCache
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run
from tunesmith.teachers import base_itself
from tunesmith.types import Example, Message, Source, TokenizedExample

PROMPTS = Path(__file__).parent / "data" / "replay_prompts.txt"
ANSWER_TOKENS = 96  # a longer answer is learned up to there, and not that it ends there
TRIED = 4  # prompts asked where there is no run yet, for a plan
ID = "replay"


def with_replay(
    recipe: Recipe,
    train: Tokenized,
    base: LoadedBase,
    renderer: Renderer,
    limit: int,
    run: Run | None,
    reporter: Reporter,
) -> Tokenized:
    """The training examples with `data.replay` of general ones spread among them. Raises InputError."""
    if train.together > 1 or train.examples[0].columns:
        raise InputError(
            f"data.replay mixes in rows with answers, and objective {recipe.objective.kind} learns otherwise; "
            "set data.replay to 0"
        )
    share = recipe.data.replay
    wanted = max(1, round(share / (1 - share) * len(train.examples)))
    written = PROMPTS.read_text(encoding="utf-8").splitlines()
    prompts = [written[i * len(written) // wanted] for i in range(wanted)] if wanted < len(written) else written
    reporter.stage(f"replay: {wanted:,} of {wanted + len(train.examples):,} examples are general, answered by the base")
    general = _answered(recipe, prompts, base, renderer, limit, run, reporter)
    places = array("q")  # of training examples; general ones count down from -1
    for i in range(len(train.examples)):
        places.append(i)
        while len(places) - (i + 1) < wanted * (i + 1) // len(train.examples):
            places.append(-1 - (len(places) - (i + 1)) % len(general))

    def example(i: int) -> TokenizedExample:
        return train.examples[places[i]] if places[i] >= 0 else general[-1 - places[i]]

    numbers = np.frombuffer(places, np.int64)
    rows = np.where(numbers < 0, -1, train.rows[np.maximum(numbers, 0)])
    return replace(train, examples=Lazy(len(numbers), example), rows=rows)


def _answered(
    recipe: Recipe,
    prompts: Sequence[str],
    base: LoadedBase,
    renderer: Renderer,
    limit: int,
    run: Run | None,
    reporter: Reporter,
) -> list[TokenizedExample]:
    """Each prompt with the base's own greedy answer."""
    if run is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
    asked = prompts if run is not None else prompts[:TRIED]
    turns = [cast(Message, {"role": "user", "content": text}) for text in asked]
    model = base_itself(recipe, base, renderer, ANSWER_TOKENS)
    cache = ReplyCache(None if run is None else run.replies)
    replies = cache.answer(model, [Prompt((turn,)) for turn in turns], reporter.advance)
    pairs = [(turn, reply) for turn, reply in zip(turns, replies, strict=True) if reply.output.strip()]
    if not pairs:
        raise InputError("the base answers no general prompt, so there is nothing to replay; set data.replay to 0")
    how = recipe.data.model_copy(update={"train_on": "last", "on_long": "truncate"})
    rows = [_row(i, turn, reply) for i, (turn, reply) in enumerate(pairs)]
    found = [*tokenize(rows, renderer, how, limit).examples]
    for example, (_, reply) in zip(found, pairs, strict=True):
        if reply.finish_reason == "length":
            example.weights[-1] = 0.0
    return found


def _row(i: int, turn: Message, reply: Reply) -> Example:
    answer = cast(Message, {"role": "assistant", "content": reply.output})
    return Example(f"{ID} {i + 1}", Source(PROMPTS.name, i + 1), "chat", messages=(turn, answer))
