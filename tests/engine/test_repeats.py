"""Layers repeated as moved kernels: the same bits as layers that the interpreter runs one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_adapters import put
from tiny import build, engine_over

from tunesmith.cpu import tape
from tunesmith.cpu.writing import processor
from tunesmith.engine.attention import CacheContext
from tunesmith.engine.engine import Engine
from tunesmith.engine.repeats import Memory, Repeats
from tunesmith.engine.request import Answer, Request
from tunesmith.models.fused_ops import swiglu
from tunesmith.models.lora import wrap
from tunesmith.models.peft_format import save_adapter

pytestmark = pytest.mark.skipif(processor() is None, reason="no kernels")
WIDE = {"head_dim": 16}  # a whole vector of any processor: attention by kernels
LAYERS = 4  # as tiny.py has it
LONG = [*range(5, 90), 60, 61]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every layer that was repeated."""
    seen: list[int] = []
    play = tape.Moved.play

    def counting(self: tape.Moved, place: int) -> None:
        seen.append(place)
        play(self, place)

    monkeypatch.setattr(tape.Moved, "play", counting)
    return seen


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Within it every layer is run by the interpreter."""

    def run(self: Repeats, call, x, kinds, memory) -> None:
        for layer in range(len(kinds)):
            call(layer, x)

    with monkeypatch.context() as patch:
        patch.setattr(Repeats, "run", run)
        yield patch


def ask(engine: Engine, *prompts: list[int], adapter: str | None = None, tokens: int = 40) -> list[Answer]:
    return engine.generate([Request(prompt_ids=p, max_tokens=tokens, adapter=adapter, logprobs=True) for p in prompts])


def engine_with(family: str, adapters: dict[str, str | tuple[str, ...]]) -> Engine:
    lora = wrap(build(family, **WIDE))
    for name, targets in adapters.items():
        put(lora, name, rank=4, targets=targets, seed=ord(name))
    return engine_over(lora, packed=True)


def conversation(family: str, adapters: dict[str, str | tuple[str, ...]]) -> list[tuple[list[int], list[float] | None]]:
    """Alone and several at a time, behind a prefix that is known by then, with adapters in turn and side by side."""
    engine = engine_with(family, adapters)
    answers = ask(engine, [5, 6, 7], tokens=150) + ask(engine, LONG, [*LONG, 3], [*LONG, 4, 5]) + ask(engine, [9, 8])
    for name in adapters:
        answers += ask(engine, [5, 6, 7], [7, 6], adapter=name) + ask(engine, [5, 6, 7])
    names = [*adapters, None] * 8
    answers += engine.generate([Request(prompt_ids=[9, 5 + i], adapter=name) for i, name in enumerate(names)])
    if adapters:
        first, *others = adapters
        engine.remove_adapter(first)
        answers += ask(engine, [5, 6, 7]) + [each for name in others for each in ask(engine, [5, 6, 7], adapter=name)]
    return [(each.ids, each.logprobs) for each in answers]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-window"])
@pytest.mark.parametrize(
    "adapters",
    [{}, {"a": "all-linear", "b": ("q_proj", "v_proj")}, {"a": r".*layers\.[12]\..*_proj", "b": "all-linear"}],
    ids=["no adapter", "two", "one in some layers"],
)
def test_it_gives_the_same_bits(family: str, adapters: dict, played: list[int], request: pytest.FixtureRequest) -> None:
    found = conversation(family, adapters)
    assert len(played) > 500
    request.getfixturevalue("interpreted")
    assert found == conversation(family, adapters)


def test_nothing_is_repeated_that_was_not_seen_to_hold(
    played: list[int], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Here the cache is forgotten, so that every layer would read the first one's."""
    with monkeypatch.context() as patch:
        patch.setattr(CacheContext, "memory", lambda self: Memory.of([[]] * LAYERS))
        found = conversation("llama", {})
    tried = len(played)
    request.getfixturevalue("interpreted")
    assert found == conversation("llama", {})
    assert 0 < tried < 50


def test_layers_of_other_kernels_are_not_taken_for_alike(played: list[int]) -> None:
    engine = engine_with("llama", {"a": r".*layers\.[12]\..*_proj"})
    ask(engine, [5, 6, 7], adapter="a", tokens=3)
    played.clear()
    ask(engine, [6, 5, 7], adapter="a", tokens=2)
    assert sorted(set(played)) == [2, 3]


def test_an_adapter_with_dora_is_left_to_the_interpreter(played: list[int]) -> None:
    lora = wrap(build("llama", **WIDE))
    put(lora, "d", rank=4, targets="all-linear", kind="dora")
    ask(engine_over(lora, packed=True), [5, 6, 7], adapter="d")
    assert not played


def test_dora_in_some_layers_is_not_lost_in_those_like_the_others(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By the time it comes, the calls of layers without it are known to hold."""
    base, upper = wrap(build("llama", **WIDE)), r".*layers\.[23]\..*_proj"
    for name, targets, kind in (("a", "all-linear", "lora"), ("d", upper, "dora")):
        section = put(base, name, rank=4, targets=targets, kind=kind, seed=ord(name))
        save_adapter(base, name, tmp_path / name, section, "tiny")

    def answers() -> list[tuple[list[int], list[float] | None]]:
        engine, found = engine_with("llama", {}), list[Answer]()
        for name in "ad":
            engine.add_adapter(name, tmp_path / name)
            found += ask(engine, [5, 6, 7], adapter=name) + ask(engine, [5, 6, 7])
        names = [*"ad", None] * 4
        found += engine.generate([Request(prompt_ids=[9, 5 + i], adapter=name) for i, name in enumerate(names)])
        return [(each.ids, each.logprobs) for each in found]

    found = answers()
    request.getfixturevalue("interpreted")
    assert found == answers()


def test_a_tape_plays_what_was_watched_elsewhere() -> None:
    rows = [torch.randn(3, 32) for _ in range(3)]
    with tape.watching() as watched:
        out = rows[1].new_empty(3, 16)
        swiglu(rows[1], out)
    assert watched.sound
    memory = Memory.of([[each] for each in rows])
    moved = watched.moved(memory.addresses, memory.sizes[1], 1)
    for place, each in enumerate(rows):
        each.copy_(torch.randn(3, 32))
        moved.play(place)
        expected = torch.empty(3, 16)
        swiglu(each, expected)
        assert torch.equal(out, expected)


def test_a_tape_is_not_sound_where_anything_else_computes() -> None:
    gate_up, out = torch.randn(3, 32), torch.empty(3, 16)
    with tape.watching() as watched:
        swiglu(gate_up, out)
        out += 1.0
    assert not watched.sound
