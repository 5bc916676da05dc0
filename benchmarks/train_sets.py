"""Rows to train on, made from text that every Python installation carries: the topics of its `help()`.

A row is (ids, supervised): token ids, and for each whether it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pydoc_data.topics import topics

import numpy as np
from transformers import PreTrainedTokenizerBase

Row = tuple[list[int], list[bool]]
ROWS = 256


def shared(tokens: Iterator[int], random: np.random.Generator, *, prompt: int, user: int, answer: int) -> list[Row]:
    """One prompt in front of every row, then about `user` tokens, then about `answer` supervised ones."""
    front = take(tokens, prompt)
    rows = []
    for _ in range(ROWS):
        middle, end = (take(tokens, int(random.integers(size - 10, size + 11))) for size in (user, answer))
        rows.append((front + middle + end, [False] * (prompt + len(middle)) + [True] * len(end)))
    return rows


def short(tokens: Iterator[int], random: np.random.Generator) -> list[Row]:
    """30 to 60 tokens, the second half of each supervised: many steps in little time."""
    return [
        (take(tokens, n), [False] * (n - n // 2) + [True] * (n // 2))
        for n in random.integers(30, 61, 2 * ROWS).tolist()
    ]


def mixed(tokens: Iterator[int], random: np.random.Generator) -> list[Row]:
    """Lengths lognormal from 30 to 600, nothing shared, the second half of each supervised."""
    lengths = np.clip(random.lognormal(np.log(130), 0.8, ROWS), 30, 600).astype(int)
    return [(take(tokens, n), [False] * (n - n // 2) + [True] * (n // 2)) for n in lengths.tolist()]


def chains(tokens: Iterator[int], random: np.random.Generator) -> list[Row]:
    """Conversations of four turns, each assistant turn an example with all that went before as its prompt."""
    rows = []
    for _ in range(ROWS // 4):
        before = take(tokens, 30)
        for _ in range(4):
            user, answer = (take(tokens, int(random.integers(30, 90))) for _ in range(2))
            rows.append((before + user + answer, [False] * len(before + user) + [True] * len(answer)))
            before = before + user + answer
    return rows


SETS: dict[str, Callable[[Iterator[int], np.random.Generator], list[Row]]] = {
    "shared 300+100": lambda tokens, random: shared(tokens, random, prompt=300, user=60, answer=40),
    "shared 450+80": lambda tokens, random: shared(tokens, random, prompt=450, user=50, answer=30),
    "mixed lengths": mixed,
    "chains of 4": chains,
    "short rows": short,
    "shared 300+100, 262,144 tokens": lambda tokens, random: shared(tokens, random, prompt=300, user=60, answer=40),
}
VOCABULARIES = {"shared 300+100, 262,144 tokens": 262_144}  # of a base made larger for the set


def make_rows(name: str, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows of a set, the same every time."""
    text = "\n".join(topics[key] for key in sorted(topics))
    return SETS[name](endless(tokenizer(text)["input_ids"]), np.random.default_rng(0))


def endless(ids: list[int]) -> Iterator[int]:
    while True:
        yield from ids


def take(tokens: Iterator[int], count: int) -> list[int]:
    return [next(tokens) for _ in range(count)]
