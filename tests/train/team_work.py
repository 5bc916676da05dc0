"""What each worker of test_parallel.py's team does. Run under torchrun: team_work.py FOLDER."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from decoders import example, make_decoder, make_rows  # noqa: E402
from tunesmith.data.batches import Layout, Step, StepPlan, make_step  # noqa: E402
from tunesmith.models.lora import add_new_adapter, wrap  # noqa: E402
from tunesmith.recipe import Adapter, Train  # noqa: E402
from tunesmith.train import parallel  # noqa: E402
from tunesmith.train.annotate import base_likeliest, reference, with_columns  # noqa: E402
from tunesmith.train.bodies import make_body  # noqa: E402
from tunesmith.train.checkpoint import load_newest, save_checkpoint  # noqa: E402
from tunesmith.train.forward import Body, ModuleBody  # noqa: E402
from tunesmith.train.gradient import accumulate  # noqa: E402
from tunesmith.train.loop import Hooks, evaluate, train  # noqa: E402
from tunesmith.train.losses import BASE_LOGPROBS, Loss, dpo, kto, leashed, sft  # noqa: E402
from tunesmith.train.sharding import spread  # noqa: E402
from tunesmith.tree.body import prepare  # noqa: E402

LAYOUT = Layout(100)  # several micro-batches behind a prefix
LOPSIDED = [example([7, 8, 9, *range(3, 30)], 4, "long"), *(example([11, 12, i], 1, f"short {i}") for i in range(3, 9))]


def make_lora(name: str = "llama", dtype: torch.dtype = torch.float64) -> tuple[Body, dict[str, nn.Parameter]]:
    model = make_decoder(name, dtype)
    lora = wrap(model)
    add_new_adapter(lora, "a", Adapter(rank=3), seed=0)
    torch.manual_seed(3)
    for _, parameter in lora.parameters("a"):
        parameter.data = parameter.data.to(dtype) + 0.1 * torch.randn_like(parameter, dtype=dtype)
    lora.use("a")
    prepare(model)
    return make_body(model, lora, "a"), dict(lora.parameters("a"))


def make_full(name: str = "llama", dtype: torch.dtype = torch.float64) -> tuple[Body, dict[str, nn.Parameter]]:
    model = make_decoder(name, dtype)
    prepare(model)
    model.requires_grad_(True)
    return make_body(model), dict(model.named_parameters())


def shared(made: tuple[Body, dict[str, nn.Parameter]]) -> tuple[Body, dict[str, nn.Parameter]]:
    """Spread over the team, where there is one."""
    body, parameters = made
    if parallel.size() > 1:
        body = spread(ModuleBody(body.model, body.parameters), parameters, 1)
    return body, parameters


def layout(sharded: bool = False, **changes: int) -> Layout:
    return dataclasses.replace(LAYOUT, workers=parallel.size(), sharded=sharded and parallel.size() > 1, **changes)


def rows_for(kind: str, body: Body) -> tuple[list, Loss, int]:
    from test_preferences import make_pairs, make_triples

    if kind == "sft":
        return make_rows(prompt=70), sft, 1
    if kind == "leash":
        rows = make_rows(prompt=70)
        columns = base_likeliest(body, rows, layout(), lambda *_: None)
        less = [each - 0.1 for each in columns[BASE_LOGPROBS]]  # or there would be no divergence yet
        return with_columns(rows, {**columns, BASE_LOGPROBS: less}), leashed(sft, 0.5), 1
    rows, loss, together = (make_pairs(), dpo(0.3), 2) if kind == "dpo" else (make_triples(), kto(0.3), 3)
    columns = reference(body, rows, layout(together=together), lambda *_: None)
    assert np.count_nonzero(columns["reference"]) == len(rows)
    return with_columns(rows, {"reference": columns["reference"] + 0.1}), loss, together


def gradient(made: tuple[Body, dict[str, nn.Parameter]], step: Step, loss: Loss) -> dict[str, torch.Tensor]:
    body, parameters = made
    for parameter in parameters.values():
        parameter.grad = None
    total, metrics = accumulate(body, step, loss)
    found = {n: p.grad.full_tensor() if parallel.is_sharded(p) else p.grad for n, p in parameters.items()}
    numbers = {"total": total, **{f"metric {key}": value for key, value in metrics.items()}}
    held_out = evaluate(body, step, loss, 0).held_out_loss
    return {**found, **{n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()}} | {
        "held out": torch.tensor(held_out, dtype=torch.float64)
    }


def gradients() -> dict[str, dict[str, torch.Tensor]]:
    """Every case's gradient, loss and metrics: what a team must have in common with one alone."""
    found = {}
    for kind in ("sft", "leash", "dpo", "kto"):
        made = make_lora()
        rows, loss, together = rows_for(kind, made[0])
        found[kind] = gradient(made, make_step(0, 1.0, rows, layout(together=together)), loss)
    for name, make in (("modules", make_lora), ("full", make_full)):
        found[name] = gradient(make("gpt2"), make_step(0, 1.0, make_rows(prompt=70), layout()), sft)
    alone = [example([5, 6, 7, 8], 2, "alone")]
    found["one row for all"] = gradient(make_lora(), make_step(0, 1.0, alone, layout()), sft)
    for name, make in (("full in parts", make_full), ("base in parts", make_lora)):
        for rows, case in ((make_rows(prompt=70), ""), (alone, ", one row"), (LOPSIDED, ", lopsided")):
            step = make_step(0, 1.0, rows, layout(sharded=True, token_budget=100 if len(rows) > 7 else 12))
            found[name + case] = gradient(shared(make()), step, sft)
    return found


def learn(folder: Path, resume: Path | None, stop_after: int = 0) -> dict[str, torch.Tensor]:
    """Six steps of full fine-tuning, from a checkpoint where there is one, or the first of them."""
    body, parameters = shared(make_full("gpt2"))
    steps = StepPlan(make_rows(prompt=70), 5, 6, 0, True, layout(sharded=True))
    taken: list[object] = []
    hooks = Hooks(
        on_step=taken.append,
        on_checkpoint=lambda state: save_checkpoint(folder, state) and None,
        should_stop=lambda: bool(stop_after) and len(taken) == stop_after,
    )
    state = None if resume is None else load_newest(resume, parameters)
    assert (state is None) == (resume is None)
    train(body, parameters, steps, sft, Train(max_grad_norm=0.5), lr=1e-3, hooks=hooks, resume=state)
    parallel.wait()
    return {n: p.full_tensor() if parallel.is_sharded(p) else p.detach() for n, p in parameters.items()}  # type: ignore


def main() -> None:
    folder = Path(sys.argv[1])
    with parallel.team():
        found = {f"{case}/{name}": t for case, each in gradients().items() for name, t in each.items()}
        learn(folder / "in parts", None, stop_after=3)
        resumed = learn(folder / "resumed", folder / "whole")
        found |= {f"resumed/{name}": t for name, t in resumed.items()}
        save_file(
            {n: t.detach().clone().contiguous() for n, t in found.items()}, folder / f"{parallel.rank()}.safetensors"
        )
        said = parallel.gather({"rank": parallel.rank()}), parallel.from_first(parallel.rank)
        if parallel.is_first():
            (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
