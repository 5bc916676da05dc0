"""An engine of the same interface over a vLLM server: the same token ids go out, and token ids come back.

The base's tokenizer and template are read here, so prompts are the very ids that training and the own engine see; only
the weights are the server's. Adapters are registered through its API, under names that hold their content's hash, so
that a name there never means other weights than were meant. It needs vLLM 0.10.2 or newer (`return_token_ids`), started
with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and sees the adapter folders under the same paths.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import GenerationConfig

from tunesmith.chat.renderer import Renderer
from tunesmith.engine.completer import Completer, Limits, PromptRenderer
from tunesmith.engine.constraint import Grammars
from tunesmith.engine.request import Answer, Delta, FinishReason, Request, check_request
from tunesmith.engine.vllm_client import VllmClient
from tunesmith.errors import InputError
from tunesmith.models.catalogue import resolve
from tunesmith.models.folders import file_hash
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.peft_file import WEIGHTS, trained_over
from tunesmith.models.peft_format import read_config
from tunesmith.models.vocabulary import brought_template

AT_ONCE = 64  # requests of one call that are at the server at a time
TOKEN_ID = "token_id:"  # how it names tokens under return_tokens_as_token_ids
# Fields of a request that the server knows by the same name.
SAME = ("temperature", "top_p", "min_p", "n", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty")
GRAMMARS = {"schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}


class VllmEngine:
    """Answers requests through a vLLM server that serves the same base; see Engine for what each method promises.

    Differences: n samples of one seed are vLLM's own series, `cached_tokens` is unknown (0), and weights are in the
    server's type, so log-probabilities agree to about its precision.
    """

    def __init__(self, url: str, renderer: PromptRenderer, name: str, client: VllmClient | None = None) -> None:
        """Raises InputError where no server answers at `url`, e.g. http://host:8000."""
        self._client = client or VllmClient(url)
        base = next((model for model in self._client.models() if not model.get("parent")), None)
        if base is None:
            raise InputError(f"the server at {url} serves no base")
        self.renderer, self.name = renderer, name
        self.context_length = int(base.get("max_model_len") or sys.maxsize)
        self._base = str(base["id"])
        limits = Limits(self.context_length, renderer.vocab_size)
        self._completer = Completer(renderer, limits, Grammars(None, renderer.stop_ids, renderer.vocab_size))
        self._adapters: dict[str, str] = {}  # what the server calls each

    @classmethod
    def over(cls, url: str, model: str, *, revision: str | None = None, system: str | None = None) -> VllmEngine:
        """`model` is the base's name here, for its tokenizer and template. Raises InputError."""
        resolved = resolve(model, revision)
        tokenizer = load_tokenizer(resolved.folder)
        try:
            ends = GenerationConfig.from_pretrained(resolved.folder, local_files_only=True).eos_token_id
        except OSError:
            ends = None
        stop_ids = frozenset([ends] if isinstance(ends, int) else ends or ())
        return cls(url, Renderer.from_tokenizer(tokenizer, default_system=system, stop_ids=stop_ids), resolved.name)

    def generate(self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None) -> list[Answer]:
        """Answer all requests, in order. Raises InputError."""
        bodies = [self._body(request) for request in requests]  # what is wrong with one is said before any is sent
        answers: list[Answer] = []
        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(requests)))) as pool:
            for answer in pool.map(self._answer, requests, bodies):
                answers.append(answer)
                if progress is not None:
                    progress(len(answers), len(requests))
        return answers

    def keeps(self, request: Request, ids: Sequence[int]) -> bool:
        """Never known: the server's grammars are its own."""
        return False

    def stream(self, request: Request) -> Iterator[Delta]:
        """Answer one request piece by piece; leaving the loop closes the connection, and the server stops."""
        yield from self._deltas(request, self._body(request))

    def logprobs(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], adapter: str | None = None) -> list[float]:
        """Natural log-probabilities of an answer's tokens after a prompt. Raises InputError."""
        return self.score([(prompt_ids, answer_ids)], adapter)[0]

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: str | None = None
    ) -> list[list[float]]:
        """`logprobs` of many (prompt_ids, answer_ids) at once."""
        model = self._model(adapter)

        def one(pair: tuple[Sequence[int], Sequence[int]]) -> list[float]:
            prompt, ids = pair[0], [int(token) for token in (*pair[0], *pair[1])]
            self._completer.check_tokens(prompt, "prompt")
            if not pair[1]:
                return []
            # One token is always generated, so the context must have room for it.
            self._completer.check_tokens([*ids, ids[-1]], "prompt with its answer and one token more")
            body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
            found = self._client.complete(body)["choices"][0]["prompt_logprobs"]
            places = range(len(prompt), len(ids))
            return [float(found[place][str(ids[place])]["logprob"]) for place in places]

        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(pairs)))) as pool:
            return list(pool.map(one, pairs))

    def add_adapter(self, name: str, folder: str | Path, *, pinned: bool = False) -> None:
        """Register a PEFT-format adapter folder. The server loads and evicts by its own rules (`pinned` is no word
        there). Raises InputError, also for one that its base's own numbers and template do not go with."""
        if name in self._adapters:
            raise InputError(f'there is already an adapter "{name}"; remove it first or choose another name')
        path = Path(folder).resolve()
        read_config(path)
        if (how := trained_over(path)) is not None:
            raise InputError(f"the adapter was trained over its base in {how}, which no vLLM server has", file=path)
        if brought_template(path) not in (None, getattr(self.renderer, "template", None)):
            raise InputError("the adapter brings a chat template of its own, which a vLLM server can't take", file=path)
        served = f"{name}-{file_hash(path / WEIGHTS)[:12]}"
        if all(model["id"] != served for model in self._client.models()):
            self._client.load_adapter(served, str(path))
        self._adapters[name] = served

    def remove_adapter(self, name: str) -> None:
        """Take an adapter off the server. Raises InputError where there is none of that name."""
        self._client.unload_adapter(self._model(name))
        del self._adapters[name]

    def close(self) -> None:
        """Take off the server what was registered here."""
        for name in list(self._adapters):
            self.remove_adapter(name)

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _model(self, adapter: str | None) -> str:
        if adapter is None:
            return self._base
        if adapter not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise InputError(f'there is no adapter "{adapter}" on {self.name}; known: {known}')
        return self._adapters[adapter]

    def _body(self, request: Request) -> dict[str, Any]:
        """What vLLM's /v1/completions is asked. Raises InputError."""
        check_request(request)
        prompt = self._completer.prompt_ids(request)
        self._completer.check_tokens(prompt, "prompt")
        room = self.context_length - len(prompt)
        if room < 1:
            raise InputError(f"the prompt has {len(prompt)} tokens, which leaves no room of {self.context_length}")
        body: dict[str, Any] = {name: getattr(request, name) for name in SAME}
        body |= {"model": self._model(request.adapter), "prompt": prompt, "stream": True, "return_token_ids": True}
        body["max_tokens"] = min(request.max_tokens or room, room)
        body["top_k"] = request.top_k or -1
        body["ignore_eos"] = request.ignore_stop
        body["stop_token_ids"] = [] if request.ignore_stop else sorted(self.renderer.stop_ids)
        body["stop"] = list(request.stop_strings)
        if request.logprobs is not False:
            body["logprobs"] = 0 if request.logprobs is True else int(request.logprobs)
            body["return_tokens_as_token_ids"] = True
        if request.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
        for name, theirs in GRAMMARS.items():
            if (wanted := getattr(request, name)) is not None:
                body["structured_outputs"] = {theirs: list(wanted) if name == "choice" else wanted}
        return body

    def _answer(self, request: Request, body: dict[str, Any]) -> Answer:
        answers = [delta for delta in self._deltas(request, body) if delta.answer is not None]
        first, *others = (d.answer for d in sorted(answers, key=lambda delta: delta.index) if d.answer is not None)
        return replace(first, others=tuple(others))

    def _deltas(self, request: Request, body: dict[str, Any]) -> Iterator[Delta]:
        """Pieces as they come; past the deadline what there is."""
        deadline = math.inf if request.timeout is None else time.monotonic() + request.timeout
        samples = [_Sample(index) for index in range(request.n)]
        with closing(self._client.stream(body)) as events:
            for event in events:
                for choice in event.get("choices", ()):
                    sample = samples[choice["index"]]
                    ids = sample.take(choice)
                    answer = self._finished(sample, request, body) if sample.finish_reason else None
                    yield Delta(choice.get("text") or "", ids, sample.index, answer)
                if time.monotonic() > deadline:
                    break
        for sample in samples:
            if sample.finish_reason is None:
                sample.finish_reason = "cancelled"
                yield Delta("", [], sample.index, self._finished(sample, request, body))

    def _finished(self, sample: _Sample, request: Request, body: Mapping[str, Any]) -> Answer:
        assert sample.finish_reason is not None
        ids, stops = sample.ids, frozenset(body["stop_token_ids"])
        text = self.renderer.decode(ids[:-1] if ids and ids[-1] in stops else ids)
        return Answer(
            text=sample.text if request.stop_strings else text,  # the server cuts stop strings off
            ids=ids,
            finish_reason=sample.finish_reason,
            prompt_tokens=len(body["prompt"]),
            logprobs=sample.logprobs if request.logprobs is not False else None,
            top_logprobs=sample.top if not isinstance(request.logprobs, bool) and request.logprobs else None,
        )


@dataclass
class _Sample:
    """One of a request's answers as it grows."""

    index: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, choice: Mapping[str, Any]) -> list[int]:
        """The next piece; its token ids."""
        ids = choice.get("token_ids")
        if ids is None and choice.get("text"):
            raise InputError("the server returns no token ids; it must be vLLM 0.10.2 or newer")
        self.ids += ids or []
        self.text += choice.get("text") or ""
        if found := choice.get("logprobs"):
            self.logprobs += [float(number) for number in found["token_logprobs"]]
            self.top += [_likeliest(place or {}) for place in found.get("top_logprobs") or ()]
        if reason := choice.get("finish_reason"):
            self.finish_reason = reason if reason in ("stop", "length") else "cancelled"
        return list(ids or [])


def _likeliest(place: Mapping[str, float]) -> list[tuple[int, float]]:
    pairs = [(int(name.removeprefix(TOKEN_ID)), float(number)) for name, number in place.items()]
    return sorted(pairs, key=lambda pair: -pair[1])
