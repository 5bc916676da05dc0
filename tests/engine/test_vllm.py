"""The engine over a vLLM server answers as the own one does, because the same ids go out and come back."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, LetterRenderer, build, engine_over
from vllm_server import FakeVllm

import tiny_llama
import tunesmith
from small_jobs import make_questions
from tunesmith import cli, conversation
from tunesmith.engine.engine import Engine
from tunesmith.engine.opening import open_engine
from tunesmith.engine.request import Request
from tunesmith.engine.vllm import VllmEngine
from tunesmith.errors import InputError
from tunesmith.models.lora import add_new_adapter, wrap
from tunesmith.models.peft_format import save_adapter
from tunesmith.prove.answering import EngineModel, Prompt, Weights
from tunesmith.recipe import Adapter as Section
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run

PROMPT = [9, 8, 7]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESMITH_OFFLINE", raising=False)


def owning() -> Engine:
    engine = engine_over(wrap(build("llama")))
    engine._live = False
    return engine


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    server = FakeVllm(owning())
    yield server
    server.shutdown()


@pytest.fixture
def engine(server: FakeVllm) -> VllmEngine:
    return VllmEngine(server.url, LetterRenderer(), "tiny")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    lora, section = wrap(build("llama")), Section(rank=4, alpha=8)
    add_new_adapter(lora, "x", section, seed=1)
    for _, weights in lora.parameters("x"):
        weights.data.normal_(0, 0.3)
    save_adapter(lora, "x", tmp_path / "x", section, "tiny")
    return tmp_path / "x"


def test_answers_are_those_of_the_own_engine(engine: VllmEngine, adapter: Path) -> None:
    own = owning()
    for each in (own, engine):
        each.add_adapter("a", adapter)
    requests = [
        Request(prompt_ids=PROMPT, max_tokens=9, logprobs=True),
        Request(prompt_ids=PROMPT, max_tokens=9, adapter="a", logprobs=3),
        Request(messages=[{"role": "user", "content": "hello"}], max_tokens=5, ignore_stop=True),
        Request(prompt="ab", temperature=1.0, seed=4, n=3, max_tokens=6),
        Request(prompt_ids=PROMPT, max_tokens=40, stop=["2"], ignore_stop=True),
    ]
    told: list[int] = []
    answers = engine.generate(requests, lambda done, of: told.append(done))
    assert told == [1, 2, 3, 4, 5]
    for expected, found in zip(own.generate(requests), answers, strict=True):
        for one, other in zip((expected, *expected.others), (found, *found.others), strict=True):
            assert (one.ids, one.text, one.finish_reason) == (other.ids, other.text, other.finish_reason)
            assert one.prompt_tokens == other.prompt_tokens
            assert other.logprobs == (None if one.logprobs is None else pytest.approx(one.logprobs, abs=1e-4))
    assert [t for t, _ in answers[1].top_logprobs[0]] == [t for t, _ in own.generate([requests[1]])[0].top_logprobs[0]]
    assert answers[0].ids != answers[1].ids, "the adapter was not asked"
    expected = own.score([(PROMPT, [5, 6, 1]), (PROMPT, [])], "a")
    assert engine.score([(PROMPT, [5, 6, 1]), (PROMPT, [])], "a")[0] == pytest.approx(expected[0], abs=1e-4)


def test_a_stream_comes_in_pieces_and_a_client_that_goes_away_stops_the_server(server: FakeVllm) -> None:
    engine, request = VllmEngine(server.url, LetterRenderer(), "tiny"), Request(prompt_ids=PROMPT, max_tokens=9)
    deltas = list(engine.stream(request))
    assert len(deltas) > 2
    assert "".join(delta.text for delta in deltas) == deltas[-1].answer.text
    server.wait = 0.02
    stream = engine.stream(Request(prompt_ids=PROMPT, max_tokens=190, ignore_stop=True))
    next(stream)
    stream.close()
    limit = time.monotonic() + 20
    while not server.left and time.monotonic() < limit:
        time.sleep(0.05)
    assert server.left == 1
    late = engine.generate([Request(prompt_ids=PROMPT, max_tokens=190, ignore_stop=True, timeout=0.2)])[0]
    assert late.finish_reason == "cancelled"
    assert 0 < len(late.ids) < 190


def test_what_is_asked_is_said_in_vllms_words(server: FakeVllm, engine: VllmEngine) -> None:
    engine.generate([Request(prompt_ids=PROMPT, choice=["a", "b"], logit_bias={5: 1.0}, top_k=0)])
    body = server.seen[0]
    assert body["prompt"] == PROMPT
    assert body["max_tokens"] == CONTEXT - 3
    assert (body["top_k"], body["stop_token_ids"], body["ignore_eos"]) == (-1, [1], False)
    assert body["structured_outputs"] == {"choice": ["a", "b"]}
    assert body["logit_bias"] == {"5": 1.0}
    assert body["return_token_ids"]
    assert "logprobs" not in body


def test_adapters_are_registered_by_content_and_taken_off_again(
    server: FakeVllm, engine: VllmEngine, adapter: Path
) -> None:
    engine.add_adapter("a", adapter)
    served = next(iter(server.adapters))
    assert served.startswith("a-")
    VllmEngine(server.url, LetterRenderer(), "tiny").add_adapter("a", adapter)  # the same weights: nothing to do
    assert server.adapters == {served}
    with pytest.raises(InputError, match='already an adapter "a"'):
        engine.add_adapter("a", adapter)
    with engine:
        pass
    assert server.adapters == set()
    with pytest.raises(InputError, match='no adapter "a" on tiny; known: none'):
        engine.generate([Request(prompt_ids=PROMPT, adapter="a")])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt_ids=[]), "prompt is empty"),
        (Request(prompt_ids=[3] * (CONTEXT + 1)), f"has {CONTEXT + 1} tokens, but the base takes {CONTEXT}"),
        (Request(prompt_ids=[3] * CONTEXT), "no room"),
        (Request(prompt_ids=[3], adapter="nope"), 'no adapter "nope"'),
        (Request(prompt_ids=[97]), "token 97"),
        (Request(prompt_ids=[3], temperature=-1), "temperature"),
    ],
)
def test_a_bad_request_is_a_sentence_and_nothing_is_sent(
    server: FakeVllm, engine: VllmEngine, request_: Request, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate([Request(prompt_ids=PROMPT), request_])
    assert server.seen == []


def test_a_server_that_will_not_do_is_said_so(
    server: FakeVllm, engine: VllmEngine, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token_ids = False
    with pytest.raises(InputError, match=r"vLLM 0\.10\.2"):
        engine.generate([Request(prompt_ids=PROMPT, max_tokens=3)])
    server.engine.add_adapter = lambda *_: (_ for _ in ()).throw(InputError("x"))  # type: ignore[method-assign]
    with pytest.raises(InputError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        engine.add_adapter("a", adapter)
    with pytest.raises(InputError, match="no vLLM server answers"):
        VllmEngine("http://127.0.0.1:9", LetterRenderer(), "tiny")
    with pytest.raises(InputError, match="looks like http"):
        VllmEngine("host:8000", LetterRenderer(), "tiny")
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    with pytest.raises(InputError, match="TUNESMITH_OFFLINE"):
        VllmEngine(server.url, LetterRenderer(), "tiny")


def test_chat_talks_through_the_server_unchanged(tmp_path: Path) -> None:
    folder = tiny_llama.save(tmp_path / "base", max_position_embeddings=256, initializer_range=0.25)
    server = FakeVllm(Engine(folder))
    settings = {"system": None, "temperature": 0.0, "max_tokens": 6}
    own = conversation.open_conversation(str(folder), **settings)
    theirs = conversation.open_conversation(str(folder), vllm=server.url, **settings)
    assert isinstance(theirs.engine, VllmEngine)
    assert "".join(theirs.ask("hi")) == "".join(own.ask("hi"))
    assert theirs.answer.ids == own.answer.ids
    assert len(server.seen) == 1
    server.shutdown()


def test_proving_asks_the_server_unchanged(engine: VllmEngine, adapter: Path) -> None:
    own = owning()
    prompts = [Prompt(({"role": "user", "content": text},)) for text in ("hello", "two", "x" * (CONTEXT - 2))]
    replies = []
    for each in (own, engine):
        each.add_adapter("a", adapter)
        replies.append(EngineModel(Weights(each, "a"), 6).answer(prompts))
    assert [(r.output, r.finish_reason, r.output_tokens, r.error is None) for r in replies[0]] == [
        (r.output, r.finish_reason, r.output_tokens, r.error is None) for r in replies[1]
    ]
    assert replies[1][0].output_tokens


def test_a_proof_from_the_command_line_asks_the_server_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    train = {"max_steps": 3, "batch_examples": 5, "lr": 1e-2, "eval_every": 0}
    recipe = Recipe.load(make_questions(tmp_path, base={"initializer_range": 0.25}, train=train))
    run = tunesmith.train(recipe, tmp_path / "run")
    tunesmith.prove(run.folder)
    own = outputs(run)

    def prove(url: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tunesmith", "prove", str(run.folder), "--vllm", url, "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    server = FakeVllm(Engine(tmp_path / "base"))
    status, out, said = prove(server.url)
    server.shutdown()
    assert status == 0, said
    assert [each["name"] for each in json.loads(out)["contenders"]] == ["prompt", "tuned"]
    assert len(own) == 8
    assert outputs(run) == own
    asked = [body["model"] for body in server.seen]
    assert asked.count("base") >= 4  # the base as it is, remembered by nobody
    assert len([name for name in asked if name.startswith("tuned-")]) == 4
    status, out, said = prove("http://127.0.0.1:9")
    assert (status, out) == (2, "")
    assert "no vLLM server answers" in said.splitlines()[-1]


def outputs(run: Run) -> dict[tuple[str, str], tuple[str, str]]:
    """What each contender of a proof said to each item, and why it stopped."""
    rows = [json.loads(line) for line in run.items.read_text().splitlines()]
    return {(row["contender"], row["item"]): (row["output"], row["finish_reason"]) for row in rows}


def test_what_a_servers_base_cannot_be_is_refused_and_not_asked(
    server: FakeVllm, engine: VllmEngine, adapter: Path
) -> None:
    """Quantised as in training, or with a template of an adapter's own: the answers would be others' than proved."""
    with pytest.raises(InputError, match=r"quantised \(nf4\).*export --to merged"):
        open_engine("tiny", vllm=server.url, quantize="nf4")
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "base_quantize": "nf4"})
    with pytest.raises(InputError, match="over its base in nf4"):
        engine.add_adapter("a", adapter)
    save_file(load_file(weights), weights)
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match="a chat template of its own"):
        engine.add_adapter("a", adapter)
    assert server.adapters == set()
