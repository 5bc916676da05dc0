"""The engine beside transformers, PEFT and llama.cpp, in one process, on the same prompts and weights.

    python benchmarks/engine.py                 all works
    python benchmarks/engine.py few-shot short  only these
    python benchmarks/engine.py --repeat 5      best of five, taken in turn, so that a busy machine slows all alike
    python benchmarks/engine.py --quick         a tenth of each: whether it runs, not how fast

Works: few-shot (145 items behind one block of examples), short (64 short prompts), adapters (16 requests on 16
adapters), stream (one request, also with 8-bit weights), prompt (one long prompt), first (the first token behind a
cached prompt of 2,000), thousand (1,000 adapters registered, requests by Zipf's law). Rates are generated tokens a
second, prompts included; a table of goals comes last.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Request
from tunesmith.models.catalogue import gguf_file, resolve
from tunesmith.models.loading import load_base
from tunesmith.models.lora import LoraModel, add_new_adapter, wrap
from tunesmith.models.peft_format import remove_adapter, save_adapter
from tunesmith.recipe import Adapter as Section

BASE = "smollm2-135m-instruct"
RANKS = (4, 8, 16, 32, 64)
Run = Callable[[], int]  # does the work once; how many tokens it generated
OURS = "tunesmith"
QUICK = 10  # how much smaller a quick run is


@dataclass(frozen=True)
class Goal:
    """A line of the table at the end."""

    work: str
    found: str
    goal: str
    reached: bool


@dataclass
class Bench:
    """What all works share."""

    engine: Engine
    rival: PreTrainedModel
    repeat: int
    quick: bool
    goals: list[Goal] = field(default_factory=list)

    def some(self, count: int) -> int:
        """A number of requests or tokens, smaller in a quick run."""
        return max(1, count // QUICK) if self.quick else count

    def at_least(self, work: str, ratio: float, goal: float, unit: str) -> None:
        self.goals.append(Goal(work, f"{ratio:.2f} x {unit}", f"{goal:g} x", ratio >= goal))

    def at_most(self, work: str, found: float, goal: float, unit: str) -> None:
        self.goals.append(Goal(work, f"{found:.1f} {unit}", f"at most {goal:g} {unit}", found <= goal))


def prompts(engine: Engine, count: int, shared: int, own: int) -> list[list[int]]:
    """Token ids: `shared` in common, then between half and all of `own` different ones."""
    chance = random.Random(0)
    vocabulary = engine.renderer.vocab_size

    def some(n: int) -> list[int]:
        return [chance.randrange(100, vocabulary) for _ in range(n)]

    block = some(shared)
    return [block + some(chance.randint(own // 2, own)) for _ in range(count)]


def by_engine(engine: Engine, asked: list[list[int]], out: int, adapters: Sequence[str | None] | None = None) -> Run:
    names = adapters or [None] * len(asked)
    requests = [
        Request(prompt_ids=ids, adapter=name, max_tokens=out, ignore_stop=True)
        for ids, name in zip(asked, names, strict=True)
    ]

    def run() -> int:
        engine._core.reset()  # nothing is remembered from the run before
        return sum(len(answer.ids) for answer in engine.generate(requests))

    return run


def by_transformers(model: PreTrainedModel, asked: list[list[int]], out: int, batch: int, **settings) -> Run:
    """`generate` on left-padded batches."""

    def run() -> int:
        for start in range(0, len(asked), batch):
            some = asked[start : start + batch]
            width = max(map(len, some))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in some])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
            chosen = {key: value[start : start + batch] for key, value in settings.items()}
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=out, min_new_tokens=out, do_sample=False, **chosen
            )
        return out * len(asked)

    return run


def compare(title: str, runs: dict[str, Run], repeat: int) -> dict[str, float]:
    """Run them in turn and print each one's best rate, and how many times the first's it is; the rates."""
    best: dict[str, float] = {}
    for _ in range(repeat):
        for name, run in runs.items():
            began = time.perf_counter()
            tokens = run()
            rate = tokens / (time.perf_counter() - began)
            best[name] = max(rate, best.get(name, 0.0))
    first = next(iter(best.values()))
    print(f"\n{title}")
    for name, rate in best.items():
        print(f"  {name:44} {rate:8.1f} tokens/s {rate / first:6.2f} x", flush=True)
    return best


def ahead(rates: dict[str, float], rivals: str, ours: str = OURS) -> float:
    """How many times the best of the rivals whose names begin like this."""
    return rates[ours] / max(rate for name, rate in rates.items() if name.startswith(rivals))


def few_shot(bench: Bench) -> None:
    """The rival computes the block for every item, so a part of the items gives its rate."""
    asked, out = prompts(bench.engine, bench.some(145), shared=bench.some(600), own=30), bench.some(60)
    runs = {f"transformers, batches of {b}": by_transformers(bench.rival, asked[:b], out, b) for b in (16, 32)}
    runs[OURS] = by_engine(bench.engine, asked, out)
    rates = compare(f"{len(asked)} items behind a shared block, {out} out", runs, bench.repeat)
    bench.at_least("145 items behind a 5-shot block", ahead(rates, "transformers"), 4, "transformers")


def short(bench: Bench) -> None:
    asked, out = prompts(bench.engine, bench.some(64), shared=0, own=40), bench.some(48)
    runs = {f"transformers, batches of {b}": by_transformers(bench.rival, asked, out, b) for b in (16, 64)}
    runs[OURS] = by_engine(bench.engine, asked, out)
    rates = compare(f"{len(asked)} short prompts, nothing shared, {out} out", runs, bench.repeat)
    bench.at_least("64 short prompts", ahead(rates, "transformers"), 2, "transformers")


def stream(bench: Bench) -> None:
    """llama.cpp is the mark to aim for at the same bits; it counts where llama-cpp-python is installed."""
    asked, out = prompts(bench.engine, 1, shared=0, own=32), bench.some(48)
    eighth = Engine(BASE, quantize="int8")
    runs = {
        "transformers": by_transformers(bench.rival, asked, out, 1),
        OURS: by_engine(bench.engine, asked, out),
        "tunesmith, int8": by_engine(eighth, asked, out),
    }
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("llama_cpp"):
            runs["llama.cpp Q4_1"] = by_llama_cpp(gguf_file(BASE), asked, out)
            runs["llama.cpp Q8_0"] = by_llama_cpp(in_eight_bits(gguf_file(BASE), Path(folder)), asked, out)
        rates = compare(f"one stream, {out} out", runs, bench.repeat)
    bench.at_least("one stream, fp32", ahead(rates, "transformers"), 2, "transformers")
    bench.at_least("one stream, int8", ahead(rates, "transformers", "tunesmith, int8"), 4, "transformers")


def prompt(bench: Bench) -> None:
    asked = prompts(bench.engine, 1, shared=bench.some(1000), own=2)
    runs = {"transformers": by_transformers(bench.rival, asked, 1, 1), OURS: by_engine(bench.engine, asked, 1)}
    compare(f"one prompt of {len(asked[0])} tokens, 1 out", runs, bench.repeat)


def adapters(bench: Bench) -> None:
    """16 requests on 16 adapters of ranks 4 to 64, against PEFT's mixed batch and against one adapter for all."""
    engine, one, mixed = bench.engine, "tunesmith, all on one adapter of rank 16", "tunesmith, 16 adapters"
    names: list[str | None] = [f"r{RANKS[i % len(RANKS)]}-{i}" for i in range(16)]
    asked, out = prompts(engine, 16, shared=0, own=bench.some(128)), bench.some(64)
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(map(str, names)):
            write_adapter(Path(folder) / name, RANKS[i % len(RANKS)], seed=i)
            engine.add_adapter(name, Path(folder) / name)
        runs = {}
        if importlib.util.find_spec("peft"):
            runs["PEFT, mixed batch of 16"] = by_peft(Path(folder), list(map(str, names)), asked, out)
        runs[one] = by_engine(engine, asked, out, [names[2]] * 16)
        runs[mixed] = by_engine(engine, asked, out, names)
        runs["tunesmith, the base alone"] = by_engine(engine, asked, out)
        rates = compare(f"16 requests on 16 adapters of ranks 4 to 64, {out} out", runs, bench.repeat)
        for name in map(str, names):
            engine.remove_adapter(name)
    if importlib.util.find_spec("peft"):
        bench.at_least("16 adapters at once", ahead(rates, "PEFT", mixed), 5, "PEFT")
    bench.at_most("16 adapters at once, slower than one", 100 * (rates[one] / rates[mixed] - 1), 15, "%")


def first(bench: Bench) -> None:
    """The first token behind a prompt whose keys and values are cached."""
    asked = prompts(bench.engine, 1, shared=bench.some(2000), own=2)[0]
    by_engine(bench.engine, [asked], 1)()
    times = [first_token(bench.engine, Request(prompt_ids=asked, max_tokens=4)) for _ in range(3 * bench.repeat)]
    middle = statistics.median(times)
    print(f"\nfirst token behind a cached prompt of {len(asked)}: {middle:.1f} ms (median of {len(times)})", flush=True)
    bench.at_most("first token behind 2,000 cached", middle, 60, "ms")


def thousand(bench: Bench) -> None:
    """1,000 names over 16 folders of rank 16, 400 MB for those in memory; what a request waits for a cold one."""
    limit, asked = 400 << 20, prompts(bench.engine, 1, shared=0, own=8)[0]
    engine, chance = Engine(BASE, adapter_memory_limit=limit), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for kind in range(16):
            write_adapter(Path(folder) / str(kind), 16, seed=kind)
        began = time.perf_counter()
        for index in range(1000):
            engine.add_adapter(f"n{index}", Path(folder) / str(index % 16))
        registered = time.perf_counter() - began
        weights = [1 / (rank + 1) for rank in range(1000)]  # Zipf's law
        cold: list[float] = []
        warm: list[float] = []
        most = 0
        for index in chance.choices(range(1000), weights, k=bench.some(300)):
            held = f"n{index}" in engine._core.adapters._loaded
            ids = [*asked, 100 + index]  # a prompt of its own, so that no cached one makes it faster
            seconds = first_token(engine, Request(prompt_ids=ids, adapter=f"n{index}", max_tokens=2))
            (warm if held else cold).append(seconds)
            most = max(most, engine._core.adapters.bytes)
    usual = statistics.median(warm or cold)
    added = sorted(ms - usual for ms in cold)
    slow = added[min(len(added) - 1, int(0.95 * len(added)))]
    print(
        f"\n1,000 adapters registered in {registered:.1f} s; {len(cold)} of {len(cold) + len(warm)} requests cold: "
        f"{statistics.median(added):.0f} ms more in the middle, {slow:.0f} at the 95th percentile",
        flush=True,
    )
    bench.at_most("a cold adapter of 1,000, p95 added", slow, 100, "ms")
    bench.at_most("memory of 1,000 adapters", most / (1 << 20), limit >> 20, "MB")


def first_token(engine: Engine, request: Request) -> float:
    """Milliseconds until the first piece of an answer."""
    began = time.perf_counter()
    pieces = engine.stream(request)
    next(pieces)
    seconds = time.perf_counter() - began
    pieces.close()
    return 1000 * seconds


def write_adapter(folder: Path, rank: int, seed: int) -> None:
    """A PEFT-format adapter with weights that are not zero, the same in every run: how much its answers repeat
    themselves is how much can be guessed."""
    chance = torch.Generator().manual_seed(seed)
    lora = bare_model()
    section = Section(rank=rank, alpha=2 * rank)
    add_new_adapter(lora, "x", section, seed=seed)
    for _, weights in lora.parameters("x"):
        weights.data.normal_(0, 0.02, generator=chance)
    save_adapter(lora, "x", folder, section, BASE)
    remove_adapter(lora, "x")


@cache
def bare_model() -> LoraModel:
    return wrap(load_base(BASE).model)


def by_peft(folder: Path, names: list[str], asked: list[list[int]], out: int) -> Run:
    from peft import PeftModel

    fresh = AutoModelForCausalLM.from_pretrained(resolve(BASE).folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(fresh, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return by_transformers(model.eval(), asked, out, len(asked), adapter_names=names)


def by_llama_cpp(file: Path, asked: list[list[int]], out: int) -> Run:
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(str(file), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run() -> int:
        model.reset()
        for done, _ in enumerate(model.generate(asked[0], temp=0.0), start=1):
            if done == out:
                break
        return out

    return run


def in_eight_bits(file: Path, folder: Path) -> Path:
    """The same weights in Q8_0, by llama.cpp itself."""
    import llama_cpp

    settings, target = llama_cpp.llama_model_quantize_default_params(), folder / "Q8_0.gguf"
    settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
    assert llama_cpp.llama_model_quantize(str(file).encode(), str(target).encode(), settings) == 0
    return target


WORKS: dict[str, Callable[[Bench], None]] = {
    "few-shot": few_shot,
    "short": short,
    "adapters": adapters,
    "stream": stream,
    "prompt": prompt,
    "first": first,
    "thousand": thousand,
}


def print_goals(goals: list[Goal]) -> None:
    print(f"\n{'work':38} {'found':>24} {'goal':>16}")
    for goal in goals:
        print(f"{goal.work:38} {goal.found:>24} {goal.goal:>16}  {'reached' if goal.reached else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; none: all")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    settings = parser.parse_args()
    unknown = set(settings.works) - set(WORKS)
    if unknown:
        parser.error(f"no work is called {', '.join(sorted(unknown))}")
    torch.set_num_threads(settings.threads)
    rival = AutoModelForCausalLM.from_pretrained(resolve(BASE).folder, dtype=torch.float32).eval()
    bench = Bench(Engine(BASE), rival, 1 if settings.quick else settings.repeat, settings.quick)
    for name in settings.works or WORKS:
        WORKS[name](bench)
    print_goals(bench.goals)


if __name__ == "__main__":
    main()
