"""The engine beside transformers, PEFT and llama.cpp, in one process, on the same prompts and weights.

    python benchmarks/engine.py                 all works
    python benchmarks/engine.py few-shot short  only these
    python benchmarks/engine.py --repeat 5      best of five, taken in turn, so that a busy machine slows all alike

Works: few-shot (145 items behind one block of examples), short (64 short prompts), adapters (16 requests on 16
adapters), stream (one request), prompt (one long prompt). Rates are generated tokens a second, prompts included.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Request
from tunesmith.models.catalogue import resolve
from tunesmith.models.loading import load_base
from tunesmith.models.lora import add_new_adapter, wrap
from tunesmith.models.peft_format import save_adapter
from tunesmith.recipe import Adapter as Section

BASE = "smollm2-135m-instruct"
RANKS = (4, 8, 16, 32, 64)
Run = Callable[[], int]  # does the work once; how many tokens it generated


def prompts(engine: Engine, count: int, shared: int, own: int) -> list[list[int]]:
    """Token ids: `shared` in common, then between half and all of `own` different ones."""
    chance = random.Random(0)
    vocabulary = engine.renderer.vocab_size

    def some(n: int) -> list[int]:
        return [chance.randrange(100, vocabulary) for _ in range(n)]

    block = some(shared)
    return [block + some(chance.randint(own // 2, own)) for _ in range(count)]


def by_engine(engine: Engine, asked: list[list[int]], out: int, adapters: list[str | None] | None = None) -> Run:
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


def compare(title: str, runs: dict[str, Run], repeat: int) -> None:
    """Run them in turn and print each one's best rate, and how many times the first's it is."""
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


def few_shot(engine: Engine, rival: PreTrainedModel, repeat: int) -> None:
    """The rival computes the block for every item, so a part of the items gives its rate."""
    asked = prompts(engine, 145, shared=600, own=30)
    runs = {f"transformers, batches of {b}": by_transformers(rival, asked[:b], 60, b) for b in (8, 16, 32)}
    compare(
        "145 items behind a block of 600 tokens, 60 out", {**runs, "tunesmith": by_engine(engine, asked, 60)}, repeat
    )


def short(engine: Engine, rival: PreTrainedModel, repeat: int) -> None:
    asked = prompts(engine, 64, shared=0, own=40)
    runs = {f"transformers, batches of {b}": by_transformers(rival, asked, 48, b) for b in (16, 64)}
    compare("64 short prompts, nothing shared, 48 out", {**runs, "tunesmith": by_engine(engine, asked, 48)}, repeat)


def stream(engine: Engine, rival: PreTrainedModel, repeat: int) -> None:
    asked = prompts(engine, 1, shared=0, own=32)
    runs = {"transformers": by_transformers(rival, asked, 48, 1), "tunesmith": by_engine(engine, asked, 48)}
    if importlib.util.find_spec("llama_cpp"):
        runs["llama.cpp Q4_1"] = by_llama_cpp(asked, 48)
    compare("one stream, 48 out", runs, repeat)


def prompt(engine: Engine, rival: PreTrainedModel, repeat: int) -> None:
    asked = prompts(engine, 1, shared=1000, own=2)
    compare(
        "one prompt of 1,000 tokens, 1 out",
        {"transformers": by_transformers(rival, asked, 1, 1), "tunesmith": by_engine(engine, asked, 1)},
        repeat,
    )


def adapters(engine: Engine, rival: PreTrainedModel, repeat: int) -> None:
    """16 requests on 16 adapters of ranks 4 to 64, against PEFT's mixed batch and against one adapter for all."""
    names = [f"r{RANKS[i % len(RANKS)]}-{i}" for i in range(16)]
    asked = prompts(engine, 16, shared=0, own=128)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            write_adapter(Path(folder) / name, int(name[1:].partition("-")[0]))
            engine.add_adapter(name, Path(folder) / name)
        runs = {}
        if importlib.util.find_spec("peft"):
            runs["PEFT, mixed batch of 16"] = by_peft(Path(folder), names, asked, 64)
        runs["tunesmith, all on one adapter of rank 16"] = by_engine(engine, asked, 64, [names[2]] * 16)
        runs["tunesmith, 16 adapters"] = by_engine(engine, asked, 64, list(names))
        runs["tunesmith, the base alone"] = by_engine(engine, asked, 64)
        compare("16 requests on 16 adapters of ranks 4 to 64, 64 to 128 in, 64 out", runs, repeat)
        for name in names:
            engine.remove_adapter(name)


def write_adapter(folder: Path, rank: int) -> None:
    """A PEFT-format adapter with weights that are not zero."""
    lora = wrap(load_base(BASE).model)
    section = Section(rank=rank, alpha=2 * rank)
    add_new_adapter(lora, "x", section, seed=rank)
    for _, weights in lora.parameters("x"):
        weights.data.normal_(0, 0.02)
    save_adapter(lora, "x", folder, section, BASE)


def by_peft(folder: Path, names: list[str], asked: list[list[int]], out: int) -> Run:
    from peft import PeftModel

    fresh = AutoModelForCausalLM.from_pretrained(resolve(BASE).folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(fresh, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return by_transformers(model.eval(), asked, out, len(asked), adapter_names=names)


def by_llama_cpp(asked: list[list[int]], out: int) -> Run:
    from llama_cpp import Llama

    source = next(resolve(BASE).folder.glob("*.gguf"))
    model = Llama(str(source), n_ctx=2048, n_threads=torch.get_num_threads(), verbose=False)

    def run() -> int:
        model.reset()
        for done, _ in enumerate(model.generate(asked[0], temp=0.0), start=1):
            if done == out:
                break
        return out

    return run


WORKS = {"few-shot": few_shot, "short": short, "adapters": adapters, "stream": stream, "prompt": prompt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; none: all")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    settings = parser.parse_args()
    unknown = set(settings.works) - set(WORKS)
    if unknown:
        parser.error(f"no work is called {', '.join(sorted(unknown))}")
    torch.set_num_threads(settings.threads)
    engine = Engine(BASE)
    rival = AutoModelForCausalLM.from_pretrained(resolve(BASE).folder, dtype=torch.float32).eval()
    for name in settings.works or WORKS:
        WORKS[name](engine, rival, settings.repeat)


if __name__ == "__main__":
    main()
