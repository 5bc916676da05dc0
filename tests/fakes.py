"""A scripted stand-in for the engine: a function answers, no model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tunesmith.engine.request import Answer, Delta, Request


class FakeEngine:
    """`script` turns a request into the answer's text; a token is a character. Requests seen are kept in `seen`."""

    def __init__(self, script: Callable[[Request], str], logprob: float = -1.0) -> None:
        self.script, self.logprob, self.seen = script, logprob, list[Request]()

    def generate(self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None) -> list[Answer]:
        answers = [self._answer(request) for request in requests]
        if progress is not None:
            progress(len(answers), len(answers))
        return answers

    def stream(self, request: Request) -> Iterator[Delta]:
        answer = self._answer(request)
        yield from (Delta(character, [ord(character)]) for character in answer.text)
        yield Delta("", [], answer=answer)

    def logprobs(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], adapter: str | None = None) -> list[float]:
        return [self.logprob] * len(answer_ids)

    def _answer(self, request: Request) -> Answer:
        self.seen.append(request)
        text = self.script(request)
        prompt = request.prompt_ids or request.prompt or "".join(m.get("content") or "" for m in request.messages or ())
        return Answer(text, [ord(c) for c in text], "stop", len(prompt))
