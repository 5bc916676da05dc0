"""Many adapters over one base: each request gets what it would get alone, whatever else is in the batch."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, LetterRenderer, build, engine_over, greedy, tiny_engine

from tunesmith.engine import body
from tunesmith.engine.engine import Engine
from tunesmith.engine.packing import pack_numbers
from tunesmith.engine.request import Request
from tunesmith.errors import InputError
from tunesmith.models.lora import LoraModel, add_new_adapter, wrap
from tunesmith.models.merge import merge
from tunesmith.models.peft_format import save_adapter
from tunesmith.recipe import Adapter as Section
from tunesmith.tree.body import LayerAttention

ENDS = ("embed_tokens", "lm_head")
# name, rank, targets, kind: a mix of everything
ADAPTERS = [
    ("a", 4, "all-linear", "lora"),
    ("b", 16, ("q_proj", "v_proj"), "lora"),
    ("c", 1, ("down_proj",), "lora"),
    ("d", 8, ("k_proj", "gate_proj"), "lora"),
    ("e", 16, "all-linear", "lora"),
    ("f", 4, "all-linear", "dora"),
    ("g", 2, ("q_proj", "up_proj", "down_proj"), "dora"),
    ("h", 4, (*ENDS, "v_proj"), "lora"),
    ("i", 4, (*ENDS, "k_proj", "o_proj"), "dora"),
    ("j", 4, ENDS, "lora"),
]
BLOCK = list(range(5, 45))
PROMPTS = [[9, 8, 7], [50], [*BLOCK, 60], [*BLOCK, 61, 62], [*BLOCK, 63]]


def put(
    lora: LoraModel, name: str, rank: int, targets: str | tuple[str, ...], seed: int = 1, kind: str = "lora"
) -> Section:
    """An adapter whose weights are not zero, so that it changes what is said."""
    section = Section(kind=kind, rank=rank, alpha=2 * rank, target_modules=targets)
    add_new_adapter(lora, name, section, seed)
    generator = torch.Generator().manual_seed(seed)
    for key, weights in lora.parameters(name):
        noise = torch.randn(weights.shape, generator=generator) * 0.2
        weights.data.copy_(weights * (1 + noise) if "magnitude" in key else noise)
    return section


def carrying(family: str = "llama") -> LoraModel:
    lora = wrap(build(family))
    for seed, (name, rank, targets, kind) in enumerate(ADAPTERS):
        put(lora, name, rank, targets, seed, kind)
    return lora


@cache
def merged(name: str | None, family: str = "llama") -> torch.nn.Module:
    """The same adapter put into the weights of a model of its own."""
    return build(family) if name is None else merge(carrying(family), name).eval()


@pytest.mark.parametrize(("family", "packed"), [("llama", False), ("llama", True), ("qwen2", True), ("gemma3", False)])
def test_a_mixed_batch_answers_as_each_adapter_alone(family: str, packed: bool) -> None:
    """qwen2: a magnitude does not touch the bias; gemma3: embeddings are scaled, and tied to the head."""
    engine = engine_over(carrying(family), packed=packed)
    asked = [(prompt, name) for prompt in PROMPTS for name in (None, *(a[0] for a in ADAPTERS))]
    answers = engine.generate([Request(prompt_ids=p, adapter=n, max_tokens=8, logprobs=True) for p, n in asked])
    said = set()
    for (prompt, name), answer in zip(asked, answers, strict=True):
        ids, logprobs = greedy(merged(name, family), prompt, 8)
        assert answer.ids == ids, (name, prompt)
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
        said.add((tuple(prompt), tuple(ids)))
    assert len(said) > len(PROMPTS) * 3, "the adapters hardly change anything, so this test shows nothing"


def test_a_prefix_computed_with_one_adapter_is_not_used_for_another() -> None:
    engine = engine_over(carrying(), packed=True)
    alone = [engine.generate([Request(prompt_ids=PROMPTS[3], adapter=n, max_tokens=5)])[0] for n in ("a", "b", None)]
    again = engine.generate([Request(prompt_ids=PROMPTS[3], adapter=n, max_tokens=5) for n in ("a", "b", None)])
    assert [a.ids for a in again] == [a.ids for a in alone]
    assert [a.cached_tokens for a in again] == [0, 0, 0], "an engine over live weights remembers nothing"


def test_a_live_model_answers_with_the_weights_it_has_now() -> None:
    lora = carrying()
    engine = engine_over(lora)
    before = engine.logprobs(PROMPTS[2], [7, 8], adapter="a")
    for _, weights in lora.parameters("a"):
        weights.data.mul_(-1.5)
    after = engine.logprobs(PROMPTS[2], [7, 8], adapter="a")
    fresh = engine_over(lora).logprobs(PROMPTS[2], [7, 8], adapter="a")
    assert after == pytest.approx(fresh, abs=1e-5)
    assert after != pytest.approx(before, abs=1e-2)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    lora = wrap(build("llama"))
    for name in ("one", "two"):
        targets = r".*(proj|embed_tokens|lm_head)"
        section = put(lora, name, 4, targets, len(name) + ord(name[0]), "dora" if name == "two" else "lora")
        save_adapter(lora, name, tmp_path / name, section, "tiny")
    return {name: tmp_path / name for name in ("one", "two")}


def from_disk(folders: dict[str, Path]) -> Engine:
    engine = tiny_engine()
    engine._live = False  # this one owns its model, as Engine(model) does
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    return engine


def test_adapters_come_and_go(folders: dict[str, Path]) -> None:
    engine = from_disk(folders)
    request = Request(prompt_ids=PROMPTS[2], adapter="one", max_tokens=6)
    first = engine.generate([request])[0]
    assert engine.generate([request])[0].cached_tokens == len(PROMPTS[2]) - 1
    engine.remove_adapter("one")
    with pytest.raises(InputError, match='no adapter "one" on model; known: two'):
        engine.generate([request])
    engine.add_adapter("one", folders["two"])
    other = engine.generate([request])[0]
    assert other.cached_tokens == 0, "the removed adapter's prefix was used for the new one"
    assert other.ids == engine.generate([Request(prompt_ids=PROMPTS[2], adapter="two", max_tokens=6)])[0].ids
    assert other.ids != first.ids


def test_errors_about_adapters_are_sentences(folders: dict[str, Path], tmp_path: Path) -> None:
    engine = from_disk(folders)
    with pytest.raises(InputError, match='already an adapter "one"'):
        engine.add_adapter("one", folders["two"])
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        engine.add_adapter("three", tmp_path)
    other = wrap(build("gemma2"))
    save_adapter(other, "x", tmp_path / "x", put(other, "x", 4, "all-linear"), "gemma")
    with pytest.raises(InputError, match="fit"):
        engine.add_adapter("x", tmp_path / "x")
    with pytest.raises(InputError, match='no adapter "x"'):
        engine.logprobs([3], [4], adapter="x")


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_beyond_the_memory_limit_are_loaded_when_asked_for(packed: bool, tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(6)]
    lora = wrap(build("llama"))
    for seed, name in enumerate(names):
        section = put(lora, name, 4 + seed, r".*(proj|lm_head)", seed, ("lora", "dora")[seed % 2])
        save_adapter(lora, name, tmp_path / name, section, "tiny")
    limits = (None, 120_000)  # bytes: two or three of them
    roomy, tight = (engine_over(wrap(build("llama")), packed=packed, adapter_memory_limit=limit) for limit in limits)
    for engine in (roomy, tight):
        engine._live = False
        for name in names:
            engine.add_adapter(name, tmp_path / name, pinned=name == "n0")
    requests = [Request(prompt_ids=[n, 9], adapter=names[n % 6], max_tokens=4) for n in range(3, 23)]
    assert [a.ids for a in tight.generate(requests)] == [a.ids for a in roomy.generate(requests)]
    loaded = tight._core.adapters._loaded
    assert len(roomy._core.adapters._loaded) == 6
    assert 2 <= len(loaded) <= 4
    assert "n0" in loaded
    assert tight._core.adapters.bytes <= 120_000


def touched(tables: object) -> int:
    """Bytes of the fast body's tables."""
    projections = tables._projections
    return sum(4 * table.numel() for p in projections for table in (p._downs, p._ups))


def test_a_thousand_adapters_take_no_more_memory_than_allowed_and_answer_as_alone(tmp_path: Path) -> None:
    lora, kinds = wrap(build("llama")), 8
    for kind in range(kinds):  # ranks of several sizes, so that what is given back seldom fits what comes next
        targets = (("v_proj",), "all-linear", r".*(proj|lm_head)")[kind % 3]
        section = put(lora, f"k{kind}", (1, 9, 3, 7)[kind % 4], targets, kind, ("lora", "dora")[kind % 5 == 1])
        save_adapter(lora, f"k{kind}", tmp_path / f"k{kind}", section, "tiny")
    alone = engine_over(lora)
    request = Request(prompt_ids=[9, 8, 7], max_tokens=3)
    expected = [alone.generate([replace(request, adapter=f"k{kind}")])[0].ids for kind in range(kinds)]
    limit = 150_000
    engine = engine_over(wrap(build("llama")), packed=True, adapter_memory_limit=limit)
    engine._live = False
    for index in range(1000):
        engine.add_adapter(f"n{index}", tmp_path / f"k{index % kinds}")
    adapters = engine._core.adapters
    assert adapters.bytes == 0, "registering read the weights"
    chance = random.Random(0)
    asked = [min(int(chance.paretovariate(0.4)), 1000) - 1 for _ in range(120)]
    scattered = 0
    for start in range(0, len(asked), 12):
        some = asked[start : start + 12]
        answers = engine.generate([replace(request, adapter=f"n{i}") for i in some])
        assert [a.ids for a in answers] == [expected[i % kinds] for i in some]
        assert adapters.bytes <= limit
        assert touched(adapters._tables) <= limit
        scattered += sum(p.rows[-1] - p.rows[0] >= p.rank for p in adapters._tables.places.values())
    assert scattered, "no adapter lay in several gaps, so this test shows less than it says"


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_found_broken_when_it_is_loaded_fails_only_its_own_requests(
    packed: bool, folders: dict[str, Path]
) -> None:
    engine = engine_over(wrap(build("llama")), packed=packed)
    engine._live = False
    weights = load_file(folders["two"] / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, folders["two"] / "adapter_model.safetensors")
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    pendings = [
        engine._pending(Request(prompt_ids=[9, 8], adapter=name, max_tokens=4), object())
        for name in ("one", "two", None, "one", "two")
    ]
    for pending in pendings:
        engine._core.submit(pending.generations)
    while not engine._core.idle:
        engine._core.step()
    for pending in (pendings[1], pendings[4]):
        with pytest.raises(InputError, match="not finite"):
            pending.answer(engine._completer)
    told = [pendings[i].answer(engine._completer).ids for i in (0, 2, 3)]
    assert told[0] == told[2]
    assert told[1] == greedy(merged(None), [9, 8], 4)[0]
    with pytest.raises(InputError, match="not finite"):
        engine.add_adapter("three", folders["two"], pinned=True)
    with pytest.raises(InputError, match='no adapter "three"'):
        engine.remove_adapter("three")


def test_an_adapter_changed_on_disk_is_not_mixed_with_what_the_old_one_computed(folders: dict[str, Path]) -> None:
    engine = from_disk(folders)
    request = Request(prompt_ids=PROMPTS[2], adapter="one", max_tokens=3)
    engine.generate([request])
    weights = load_file(folders["one"] / "adapter_model.safetensors")
    save_file({key: 2 * tensor for key, tensor in weights.items()}, folders["one"] / "adapter_model.safetensors")
    engine._core.adapters._unload(1 << 40, set())
    with pytest.raises(InputError, match="was changed since it was registered"):
        engine.generate([request])
    engine.remove_adapter("one")
    engine.add_adapter("one", folders["one"])
    assert engine.generate([request])[0].cached_tokens == 0


def test_the_renderer_and_length_are_at_hand() -> None:
    engine = tiny_engine()
    assert engine.context_length == CONTEXT
    assert isinstance(engine.renderer, LetterRenderer)


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is put into the weights as soon as it has a step to itself."""
    monkeypatch.setattr(body, "MERGE_AFTER", 1)


def test_an_adapter_in_the_weights_answers_as_before_and_leaves_the_others_alone(merging: None) -> None:
    engine = engine_over(carrying(), packed=True)
    tables = engine._core.adapters._tables
    for name in ("b", "a", "c", "f", "h", "i"):
        engine.generate([Request(prompt_ids=[9, 8], adapter=name, max_tokens=2)])
        assert tables.merged == name
        for asked in (name, None, "d"):
            answers = engine.generate([Request(prompt_ids=p, adapter=asked, max_tokens=6) for p in PROMPTS])
            assert [a.ids for a in answers] == [greedy(merged(asked), p, 6)[0] for p in PROMPTS]
    mixed = [Request(prompt_ids=PROMPTS[3], adapter=n, max_tokens=6, logprobs=True) for n in ("d", None, "i", "g", "d")]
    for request, answer in zip(mixed, engine.generate(mixed), strict=True):
        ids, logprobs = greedy(merged(request.adapter), PROMPTS[3], 6)
        assert answer.ids == ids
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("merge_after", [1, 1 << 30])
def test_another_adapter_of_the_same_name_or_place_is_never_answered_by_the_old_one(
    merge_after: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "MERGE_AFTER", merge_after)
    lora = wrap(build("llama"))
    engine = engine_over(lora, packed=True)
    engine._live = False
    said = {}
    for name in ("one", "two"):
        engine.add_adapter("x", folders[name])
        said[name] = engine.generate([Request(prompt_ids=PROMPTS[2], adapter="x", max_tokens=6)])[0].ids
        engine.remove_adapter("x")
    assert said["one"] != said["two"]
    engine.add_adapter("y", folders["one"])  # where x was; x is put elsewhere, and asked for in the same way
    engine.add_adapter("x", folders["two"])
    assert engine.generate([Request(prompt_ids=PROMPTS[2], adapter="x", max_tokens=6)])[0].ids == said["two"]


def test_where_memory_is_short_no_second_copy_of_the_weights_is_made(merging: None) -> None:
    packed = body.PackedBody(
        build("llama"), pack_numbers, 20_000, dict.fromkeys(range(4), LayerAttention(0.35, None, None))
    )
    packed._merge_where_it_pays("a", 10_000)
    assert packed.tables.merged is None
