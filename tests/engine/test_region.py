"""Memory for keys and values that is given out again."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from tiny import greedy, rival, tiny_engine

from tunesmith.engine import region
from tunesmith.engine.region import Region
from tunesmith.engine.request import Request
from tunesmith.models.memory import resident_bytes

CPU = torch.device("cpu")


def address(piece: torch.Tensor) -> int:
    return piece.data_ptr()


def test_pieces_never_overlap_and_all_of_the_room_comes_back() -> None:
    it, chance = Region(1000, torch.float32, CPU), random.Random(0)
    taken: dict[int, torch.Tensor] = {}
    begin = address(first := it.take(1))
    it.give_back(first)
    for number in range(3000):
        if taken and chance.random() < 0.5:
            piece = taken.pop(value := chance.choice(list(taken)))
            assert torch.equal(piece, torch.full_like(piece, value))  # nobody else wrote to it
            it.give_back(piece)
        else:
            taken[number] = it.take(chance.randrange(1, 300)).fill_(number)
    for piece in taken.values():
        it.give_back(piece)
    assert address(it.take(1000)) == begin


def test_who_finds_no_room_gets_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Region(10, torch.float32, CPU)
    first, other = it.take(8), it.take(8)
    other.fill_(1.0)
    it.give_back(other)
    it.give_back(first)
    assert address(it.take(10)) == address(first)

    def refuse(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(region, "untouched", refuse)
    assert len(Region(1 << 20, torch.float32, CPU).take(7)) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="measured in /proc")
def test_the_pages_of_what_is_not_taken_are_given_back_when_it_is_trimmed() -> None:
    count = 8 << 20  # 32 MB
    it, before = Region(3 * count, torch.float32, CPU), resident_bytes()
    kept, other = it.take(count).fill_(1.0), it.take(count).fill_(2.0)
    assert resident_bytes() - before > 60 << 20
    it.give_back(other)
    it.trim()
    assert resident_bytes() - before < 40 << 20
    assert float(kept.sum()) == count


def test_what_an_engine_forgets_is_room_for_the_next_answers_and_goes_when_it_is_closed() -> None:
    engine = tiny_engine()
    scheduler, held = engine._core.scheduler, []
    for _ in range(3):
        answer = engine.generate([Request(prompt_ids=[5, 6, 7], max_tokens=6)])[0]
        assert answer.ids == greedy(rival("llama"), [5, 6, 7], 6)[0]
        (node,) = scheduler.tree.root(None).children.values()
        held.append((address(node.kv.keys[0]), address(scheduler.slots.kv.keys[0])))
        engine._core.reset()
        assert scheduler.tree.bytes == 0
    assert len(set(held)) == 1
    assert scheduler.slots.bytes > 0
    engine.close()
    assert scheduler.slots.bytes == 0
