"""Bad input and scarce memory: a clear error or a wait, and the others undisturbed."""

from __future__ import annotations

import gc
import itertools
import random
import sys
import threading
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from tiny import CONTEXT, greedy, rival, tiny_engine

from tunesmith.engine import completer, core, speculation
from tunesmith.engine.cache import KvSpec, LayerShape, Slots
from tunesmith.engine.request import BusyError, Request
from tunesmith.errors import InputError
from tunesmith.models.memory import resident_bytes

SMALL = 4 * 2 * 2 * 8 * 4 * 64 * 6  # bytes: 6 slots of 64 tokens of the tiny llama


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "exactly one of"),
        (Request(prompt="a", prompt_ids=[3]), "exactly one of"),
        (Request(prompt_ids=[]), "prompt is empty"),
        (Request(messages=[]), "messages is empty"),
        (Request(prompt_ids=[3] * CONTEXT), "leaves no room"),
        (Request(prompt_ids=[3] * (CONTEXT + 9)), f"has {CONTEXT + 9} tokens, but the base takes {CONTEXT}"),
        (Request(prompt_ids=[3, 97]), "token 97; the base has 0 to 96"),
        (Request(prompt_ids=[-1]), "token -1"),
        (Request(prompt_ids=[3], adapter="nope"), 'no adapter "nope"'),
        (Request(prompt_ids=[3], max_tokens=0), "max_tokens"),
        (Request(prompt_ids=[3], temperature=-1), "temperature"),
        (Request(prompt_ids=[3], temperature=float("nan")), "temperature"),
        (Request(prompt_ids=[3], top_p=0), "top_p"),
        (Request(prompt_ids=[3], n=0), "n is 0"),
        (Request(prompt_ids=[3], stop=""), "empty stop"),
        (Request(prompt_ids=[3], timeout=0), "timeout is 0"),
        (Request(prompt_ids=[3], logprobs=99), "logprobs"),
        (Request(prompt_ids=[3], logit_bias={500: 1.0}), "token 500"),
        (Request(prompt_ids=[3], schema={}, regex="a"), "one of"),
        (Request(prompt_ids=[3], schema={}), "without a tokenizer"),
        (Request(prompt_ids=[3], tools=[{"type": "function"}]), "tools"),
    ],
)
def test_a_bad_request_is_a_sentence_and_leaves_nothing_behind(request_: Request, message: str) -> None:
    engine = tiny_engine()
    with pytest.raises(InputError, match=message):
        engine.generate([Request(prompt_ids=[5], max_tokens=3), request_])
    assert engine._core.idle
    assert engine.generate([Request(prompt_ids=[5], max_tokens=3)])[0].ids == greedy(rival("llama"), [5], 3)[0]


def test_logprobs_of_nothing_and_of_too_much() -> None:
    engine = tiny_engine()
    assert engine.logprobs([3, 4], []) == []
    with pytest.raises(InputError, match="prompt is empty"):
        engine.logprobs([], [3])
    with pytest.raises(InputError, match="with its answer has"):
        engine.logprobs([3] * 200, [4] * 100)


def test_scarce_memory_makes_requests_wait_but_answers_them_all() -> None:
    engine = tiny_engine(memory_limit=SMALL)
    prompts = [[n, *range(3, 3 + 5 * (n % 9))] for n in range(3, 33)]
    prompts += [[7] * 30 + [n] for n in range(3, 13)]
    answers = engine.generate([Request(prompt_ids=p, max_tokens=20) for p in prompts])
    assert [a.ids for a in answers] == [greedy(rival("llama"), p, 20)[0] for p in prompts]
    scheduler = engine._core.scheduler
    assert scheduler.slots.bytes + scheduler.tree.bytes <= SMALL


def test_long_answers_give_way_to_each_other_when_memory_runs_out() -> None:
    """All join while short; as they grow, the newest wait, and go on later where they were."""
    engine = tiny_engine(memory_limit=SMALL)
    requests = [Request(prompt_ids=[n], max_tokens=180, ignore_stop=True) for n in range(3, 9)]
    answers = engine.generate(requests)
    alone = [tiny_engine().generate([request])[0].ids for request in requests]
    assert [a.ids for a in answers] == alone
    assert all(len(a.ids) == 180 for a in answers)


def test_a_request_that_can_never_fit_fails_alone() -> None:
    engine = tiny_engine(memory_limit=SMALL // 6)
    with pytest.raises(InputError, match="memory_limit"):
        engine.generate([Request(prompt_ids=list(range(3, 90)) * 2, max_tokens=8)])
    assert engine.generate([Request(prompt_ids=[5], max_tokens=3)])[0].ids == greedy(rival("llama"), [5], 3)[0]


def test_the_cache_is_evicted_oldest_first() -> None:
    engine = tiny_engine(memory_limit=SMALL)
    engine._live = False

    def cached(start: int) -> int:
        return engine.generate([Request(prompt_ids=list(range(start, start + 40)), max_tokens=2)])[0].cached_tokens

    assert cached(3) == 0
    assert cached(3) == 39
    for start in range(4, 20):
        cached(start)
    assert cached(19) == 39
    assert cached(3) == 0


def test_ten_thousand_requests_do_not_pile_up() -> None:
    engine = tiny_engine()
    longest = 0

    def watch(done: int, of: int) -> None:
        nonlocal longest
        longest = max(longest, len(engine._core.generations))
        if done == 600:
            raise KeyboardInterrupt

    requests = [Request(prompt_ids=[3 + n % 90], max_tokens=1) for n in range(10_000)]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, progress=watch)
    assert longest <= 300
    assert engine._core.idle


def test_a_full_queue_says_so() -> None:
    engine = tiny_engine()
    object.__setattr__(engine._core.settings, "max_waiting", 2)
    with pytest.raises(BusyError):
        engine.generate([Request(prompt_ids=[5], n=4, max_tokens=2)])
    assert engine._core.idle


def test_threads_share_the_engine() -> None:
    engine = tiny_engine()
    prompts = [[n, n + 1] for n in range(3, 19)]
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        request = Request(prompt_ids=prompts[index], max_tokens=10)
        if index % 2:
            found[index] = engine.generate([request])[0].ids
        else:
            found[index] = [token for delta in engine.stream(request) for token in delta.ids]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(len(prompts))] == [greedy(rival("llama"), p, 10)[0] for p in prompts]


def test_a_late_request_ends_with_what_it_has_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))  # a second a step, about
    monkeypatch.setattr(core, "time", clock)
    monkeypatch.setattr(completer, "time", clock)
    engine = tiny_engine(max_batch=2)
    late = Request(prompt_ids=[5], max_tokens=100, ignore_stop=True, timeout=9)
    patient = Request(prompt_ids=[6], max_tokens=40, ignore_stop=True)
    never_begun = Request(prompt_ids=[7], max_tokens=5, timeout=4)
    answers = engine.generate([late, patient, never_begun])
    assert [a.finish_reason for a in answers] == ["cancelled", "length", "cancelled"]
    assert 3 <= len(answers[0].ids) < 60
    whole = tiny_engine().generate([Request(prompt_ids=[5], max_tokens=100, ignore_stop=True)])[0]
    assert answers[0].ids == whole.ids[: len(answers[0].ids)]
    assert answers[2].ids == []
    assert engine._core.idle


def test_one_caller_with_many_requests_does_not_hold_up_another() -> None:
    engine = tiny_engine(max_batch=1)
    crowd, single = object(), object()
    many = [engine._pending(Request(prompt_ids=[n], max_tokens=2, ignore_stop=True), crowd) for n in range(3, 23)]
    one = engine._pending(Request(prompt_ids=[50], max_tokens=2, ignore_stop=True), single)
    for pending in (*many, one):
        engine._core.submit(pending.generations)
    while not one.finished:
        engine._core.step()
    assert sum(pending.finished for pending in many) <= 2
    while not engine._core.idle:
        engine._core.step()
    assert all(pending.finished for pending in many)


def test_a_caller_that_leaves_gives_up_its_place_in_the_queue() -> None:
    engine = tiny_engine(max_batch=1)
    first, second = (engine._pending(Request(prompt_ids=[n], max_tokens=9), object()) for n in (3, 4))
    for pending in (first, second):
        engine._core.submit(pending.generations)
    engine._core.step()
    engine._abandon([second])
    assert second.finished
    assert len(engine._core.scheduler.waiting) == 0
    engine._abandon([first])
    assert engine._core.idle


def test_nothing_grows_with_the_tokens_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "REMEMBERED", 256)
    engine = tiny_engine(memory_limit=SMALL)
    engine._live = False  # the cache is kept between calls, as a server keeps it
    chance = random.Random(0)

    def some_hundred_tokens() -> None:
        prompts = [[chance.randrange(3, 97) for _ in range(9)] for _ in range(12)]
        engine.generate([Request(prompt_ids=p, max_tokens=25, ignore_stop=True) for p in prompts])

    def held() -> tuple[int, int]:
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects()), tracemalloc.get_traced_memory()[0]

    for _ in range(4):
        some_hundred_tokens()
    tracemalloc.start()
    try:
        some_hundred_tokens()
        tensors, before = held()
        for _ in range(8):
            some_hundred_tokens()
        tensors_after, after = held()
    finally:
        tracemalloc.stop()
    assert tensors_after < 1.25 * tensors + 200
    assert after - before < 200_000, "2,400 tokens left more than a few bytes each behind"
    scheduler = engine._core.scheduler
    assert scheduler.slots.bytes + scheduler.tree.bytes <= SMALL


def test_a_client_that_stops_reading_a_stream_leaves_the_others_as_they_were() -> None:
    engine = tiny_engine()
    stream = engine.stream(Request(prompt_ids=[5], max_tokens=90, ignore_stop=True))
    next(stream)
    stream.close()
    assert engine._core.idle
    assert engine.generate([Request(prompt_ids=[6], max_tokens=5)])[0].ids == greedy(rival("llama"), [6], 5)[0]


def test_nothing_cached_is_evicted_to_make_slots_roomier_than_they_need_be() -> None:
    engine = tiny_engine()
    engine.generate([Request(prompt_ids=[*range(5, 60), n], max_tokens=2) for n in (3, 4)])
    it = engine._core.scheduler
    it.slots.resize(2, 192)
    cached = it.tree.bytes
    assert cached
    it.memory_limit = it.slots.bytes_for(2, 256) + cached
    assert it._reserve_to_grow(2, 256, 0)
    assert (it.slots.room, it.tree.bytes) == (256, cached)
    it.memory_limit *= 10
    assert it._reserve_to_grow(2, 320, 0)
    assert it.slots.room > 320


@pytest.mark.skipif(sys.platform != "linux", reason="measured in /proc")
def test_room_in_slots_takes_memory_only_where_it_is_used_and_holds_zeros() -> None:
    spec = KvSpec([LayerShape(4, 64, 64)] * 8, torch.float32, torch.device("cpu"))
    slots, before = Slots(spec), resident_bytes()
    slots.resize(32, 512)
    slots.kv.keys[3][2, :, :7] = 1.0
    assert slots.bytes == 256 << 20
    assert resident_bytes() - before < 8 << 20
    assert float(slots.kv.keys[3].sum()) == 4 * 7 * 64
    assert not slots.kv.values[7].any()
