"""Guessing what a greedy answer says next, from what followed the same few tokens before (prompt lookup).

    the answer so far   ... "City": "Chi          followed in the prompt by:   cago
    the next step       computes the newest token and the guesses after it, one row each
    the model says      cago ",                   the first guess was right, so one step gave two tokens

Answers that copy their input, or repeat the keys of earlier answers, are full of such places. A guess is only ever
taken where the model itself says the same, so the answer is the one it would have given. Saxena 2023, "Prompt lookup
decoding"; verification as in Leviathan et al. 2023, arXiv:2211.17192, for greedy choice.

Whether a guess pays is arithmetic. On a CPU a step of up to ROWS_FREE rows waits for the weights to come from memory;
above it every row costs the same. So a step of R sequences takes as long as max(R, ROWS_FREE) rows and a little more,
and a guess, which may cost one row, saves that divided by R where it is right: one stream guesses freely, a full batch
only what is nearly certain. How often guesses are right is counted on every token of every answer, guessed or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LENGTHS = (4, 3, 2)  # tokens that must be the same, the most telling first
LONGEST = 8  # guesses of a sequence in one step
ROWS_FREE, STEP = 16, 2  # rows up to which a step takes the same time; what it takes besides, in rows
FORGET = 0.99  # weight of what was counted before
REMEMBERED = 1 << 17  # runs of tokens kept of other answers

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that may come next, and how it was found: in the sequence's own text or in others', after how many."""

    token: int
    own: bool
    length: int


class Speculation:
    """What the answers of an engine have in common: how often guesses are right, and what each adapter said before."""

    def __init__(self) -> None:
        kinds = [(own, length) for own in (True, False) for length in LENGTHS]
        self._right, self._tried = dict.fromkeys(kinds, 1.0), dict.fromkeys(kinds, 2.0)
        self.forget()

    def forget(self) -> None:
        """Nothing is known any more of earlier answers."""
        self._fresh: dict[tuple[object, Tokens], int] = {}
        self._old: dict[tuple[object, Tokens], int] = {}

    def chance(self, guess: Guess) -> float:
        """How often guesses of this kind were right of late."""
        kind = (guess.own, guess.length)
        return self._right[kind] / self._tried[kind]

    def count(self, guess: Guess, right: bool) -> None:
        kind = (guess.own, guess.length)
        self._right[kind] = FORGET * self._right[kind] + right
        self._tried[kind] = FORGET * self._tried[kind] + 1.0

    def learn(self, key: object, context: Tokens, token: int) -> None:
        """An answer of adapter `key` went on with a token. At the limit the older half is dropped."""
        for run in _runs(context):
            self._fresh[key, run] = token
        if len(self._fresh) > REMEMBERED // 2:
            self._fresh, self._old = {}, self._fresh

    def after(self, key: object, run: Tokens) -> int | None:
        """The token that came last after a run in an answer of adapter `key`."""
        token = self._fresh.get((key, run))
        return self._old.get((key, run)) if token is None else token


class Guesser:
    """Follows one greedy answer and guesses how it goes on."""

    def __init__(self, shared: Speculation, key: object, prompt: Sequence[int]) -> None:
        self._shared, self._key = shared, key
        self._own: dict[Tokens, int] = {}  # the token that came last after each run, in prompt and answer
        self._context: Tokens = ()
        self._seen = 0  # tokens of the answer
        for token in prompt:
            self._go_on(token)

    def see(self, answer: Sequence[int]) -> None:
        """Take in what is new in the answer, guessed or not."""
        for token in answer[self._seen :]:
            guess = self._next(self._context)
            if guess is not None:
                self._shared.count(guess, guess.token == token)
            self._shared.learn(self._key, self._context, token)
            self._go_on(token)
        self._seen = len(answer)

    def guess(self, sequences: int, room: int) -> list[int]:
        """What is likely enough to come next to be computed along, among so many sequences; at most `room` tokens."""
        context, tokens, likely = self._context, list[int](), 1.0
        while len(tokens) < min(LONGEST, room) and (guess := self._next(context)) is not None:
            likely *= self._shared.chance(guess)
            if likely * (max(sequences, ROWS_FREE) + STEP) < sequences:
                break
            tokens.append(guess.token)
            context = _moved(context, guess.token)
        return tokens

    def _go_on(self, token: int) -> None:
        for run in _runs(self._context):
            self._own[run] = token
        self._context = _moved(self._context, token)

    def _next(self, context: Tokens) -> Guess | None:
        for run in _runs(context):
            own = self._own.get(run)
            token = self._shared.after(self._key, run) if own is None else own
            if token is not None:
                return Guess(token, own is not None, len(run))
        return None


def _runs(context: Tokens) -> list[Tokens]:
    """The ends of a context that are looked up, the longest first."""
    return [context[-length:] for length in LENGTHS if len(context) >= length]


def _moved(context: Tokens, token: int) -> Tokens:
    return (*context, token)[-LENGTHS[0] :]
