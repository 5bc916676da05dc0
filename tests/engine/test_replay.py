"""Steps of few rows played from a tape: the same bits as steps run one operation after the other."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_adapters import put
from tiny import build, engine_over

from tunesmith.cpu import tape
from tunesmith.cpu.writing import processor
from tunesmith.engine import body, replay
from tunesmith.engine.cache import _nodes
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Answer, Request
from tunesmith.models.fused_ops import swiglu
from tunesmith.models.lora import wrap

pytestmark = pytest.mark.skipif(processor() is None, reason="no kernels")
WIDE = {"head_dim": 16}  # a whole vector of any processor: attention by kernels
LONG = [*range(5, 90), 60, 61]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernels of each tape that was played."""
    seen: list[int] = []
    play = tape.Tape.play

    def counting(self: tape.Tape) -> None:
        seen.append(self.count)
        play(self)

    monkeypatch.setattr(tape.Tape, "play", counting)
    return seen


def ask(engine: Engine, *prompts: list[int], adapter: str | None = None, tokens: int = 40) -> list[Answer]:
    return engine.generate([Request(prompt_ids=p, max_tokens=tokens, adapter=adapter, logprobs=True) for p in prompts])


def conversation(family: str, adapters: str) -> list[tuple[list[int], list[float] | None]]:
    """Alone and a few at a time, behind a prefix that is known by then, with adapters in turn."""
    lora = wrap(build(family, **WIDE))
    for name in adapters:
        put(lora, name, rank=4, targets="all-linear", seed=ord(name))
    engine = engine_over(lora, packed=True)
    answers = ask(engine, [5, 6, 7], tokens=150) + ask(engine, LONG, [*LONG, 3], [*LONG, 4, 5]) + ask(engine, [9, 8])
    for name in adapters * 3:
        answers += ask(engine, [5, 6, 7], [7, 6], adapter=name) + ask(engine, [5, 6, 7])
    if adapters:
        engine.remove_adapter(adapters[0])
        answers += ask(engine, [5, 6, 7]) + ask(engine, [5, 6, 7], adapter=adapters[1])
    return [(each.ids, each.logprobs) for each in answers]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window"])
@pytest.mark.parametrize("adapters", ["", "ab"])
def test_it_gives_the_same_bits(family: str, adapters: str, played: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = conversation(family, adapters)
    assert len(played) > 50
    monkeypatch.setattr(body, "MOST_ROWS", 0)
    assert found == conversation(family, adapters)


def test_tapes_keep_the_tables_of_adapters_they_read() -> None:
    """What a step's adapters are is noted in tensors of its own, which the next step's replace."""
    lora = wrap(build("llama", **WIDE))
    for name in "ab":
        put(lora, name, rank=4, targets="all-linear", seed=ord(name))
    engine = engine_over(lora, packed=True)
    ask(engine, [5, 6], adapter="a")
    mix = weakref.ref(engine._core._body._last[1])
    ask(engine, [5, 6], adapter="b", tokens=2)
    gc.collect()
    assert mix() is not None


def test_tapes_keep_no_keys_and_values_from_eviction(played: list[int]) -> None:
    engine = engine_over(wrap(build("llama", **WIDE)), packed=True)
    ask(engine, LONG, [*LONG, 3], [*LONG, 4, 5])
    ask(engine, [*LONG, 6])
    assert played
    core = engine._core
    stores = [core.scheduler.slots.kv, *(node.kv for node in _nodes(core.scheduler.tree.root(None)))]
    theirs = {t.untyped_storage().data_ptr() for kv in stores for t in (*kv.keys, *kv.values)}
    known = core._body._replays._known.values()
    kept = [t for each in known if not isinstance(each, bool) for t in each.tape.kept if isinstance(t, torch.Tensor)]
    assert kept
    assert not theirs & {t.untyped_storage().data_ptr() for t in kept}
    assert len(known) <= replay.MOST_TAPES


def test_a_tape_plays_what_was_watched_with_whatever_lies_there_now() -> None:
    gate_up = torch.randn(3, 32)
    with tape.watching() as watched:
        out = gate_up.new_empty(3, 16)
        swiglu(gate_up, out)
    assert (watched.sound, watched.count) == (True, 1)
    gate_up.copy_(torch.randn(3, 32))
    watched.play()
    assert torch.equal(out, _swiglu(gate_up))


def test_a_tape_is_not_sound_where_anything_else_computes() -> None:
    gate_up, out = torch.randn(3, 32), torch.empty(3, 16)
    with tape.watching() as watched:
        swiglu(gate_up, out)
        out += 1.0
    assert not watched.sound


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2)
    swiglu(gate_up, out)
    return out
