"""One run of one trainer, in a process of its own: what it took and what its losses were, as JSON on stdout."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from train_sets import VOCABULARIES, Row, make_rows
from transformers import PretrainedConfig

from tunesmith.data.batches import Step
from tunesmith.models.loading import LoadedBase, load_base
from tunesmith.models.lora import linears

BASE = "smollm2-135m-instruct"
BATCH, LR = 16, 2e-4
TRL_ROWS_AT_ONCE = 4  # 16 at once need more than 24 GB


def report(
    losses: list[float], seconds: list[float], tokens: list[int], computed: list[int], flops: list[int] | None = None
) -> dict:
    """The first step warms up and is left out where there are others."""
    first = 1 if len(seconds) > 1 else 0
    return {
        "losses": losses,
        "tokens_per_second": sum(tokens[first:]) / sum(seconds[first:]),
        "computed_per_second": sum(computed[first:]) / sum(seconds[first:]),
        "flops_per_second": sum((flops or [])[first:]) / sum(seconds[first:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def load(name: str) -> LoadedBase:
    """The base; for some sets with a larger vocabulary, its new rows random."""
    base = load_base(BASE)
    if name in VOCABULARIES:
        torch.manual_seed(0)
        base.model.resize_token_embeddings(VOCABULARIES[name], mean_resizing=False)
        base.model.requires_grad_(False)
    return base


def make_adapter(folder: Path) -> None:
    """The adapter every trainer starts from."""
    from tunesmith.models.lora import add_new_adapter, wrap
    from tunesmith.models.peft_format import save_adapter
    from tunesmith.recipe import Adapter

    lora, section = wrap(load_base(BASE).model), Adapter(rank=16, alpha=32)
    add_new_adapter(lora, "start", section, seed=0)
    save_adapter(lora, "start", folder, section, BASE)


def needed_flops(config: PretrainedConfig, body: int, adapter_weights: int, step: Step) -> int:
    """What a step's products can't do without, two to a multiplication.

    The frozen linears and the head forward and back to their input; attention's two products forward and five back for
    every pair of tokens where one sees the other; the adapter's product forward and its two back. `body`: how many
    weights the inner linears have.
    """
    head = config.vocab_size * config.hidden_size
    scored = seen = 0
    for group in step.groups:
        for tree in (*group.trees, *([] if group.prefix is None else [group.prefix])):
            scored += len(np.unique(tree.rows))
            seen += int((tree.position_ids + 1).sum())  # a token sees all above it
    attention = 2 * 7 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return step.computed_tokens * (4 * body + 6 * adapter_weights) + scored * 4 * head + seen * attention


def run_tunesmith(name: str, rows: list[Row], adapter: Path, steps: int) -> dict:
    from tunesmith.data.batches import StepPlan
    from tunesmith.models.lora import wrap
    from tunesmith.models.peft_format import load_adapter
    from tunesmith.recipe import Train
    from tunesmith.train.bodies import make_body
    from tunesmith.train.estimate import choose_layout, memory_limit
    from tunesmith.train.loop import Hooks, StepMetrics, train
    from tunesmith.train.losses import sft
    from tunesmith.tree.body import prepare
    from tunesmith.types import TokenizedExample

    model = load(name).model
    inner = sum(linear.weight.numel() for linear in linears(model).values())  # once wrapped, the head is among them
    lora = wrap(model)
    load_adapter(lora, "tuned", adapter)
    lora.use("tuned")
    prepare(model)
    examples = [
        TokenizedExample(str(i), np.array(ids, dtype=np.int32), np.array(supervised, dtype=np.float32))
        for i, (ids, supervised) in enumerate(rows)
    ]
    body, parameters = make_body(model, lora, "tuned"), dict(lora.parameters("tuned"))
    layout = choose_layout(body, parameters, examples, memory_limit("auto"), share=True, pack=True)
    assert layout is not None
    plan = StepPlan(examples, BATCH, steps, 0, False, layout)
    seen: list[StepMetrics] = []
    settings = Train(schedule="constant", warmup_ratio=0.0)
    train(body, parameters, plan, sft, settings, lr=LR, hooks=Hooks(on_step=seen.append))
    return report(
        [m.loss for m in seen],
        [m.seconds for m in seen],
        [m.tokens for m in seen],
        [m.computed_tokens for m in seen],
        [needed_flops(model.config, inner, sum(p.numel() for p in parameters.values()), plan[i]) for i in range(steps)],
    )


def run_trl(name: str, rows: list[Row], adapter: Path, steps: int, *, grouped: bool) -> dict:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base = load(name)
    model = PeftModel.from_pretrained(base.model, adapter, is_trainable=True)
    rows_as_columns = {"input_ids": [ids for ids, _ in rows], "completion_mask": [[int(s) for s in m] for _, m in rows]}
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=TRL_ROWS_AT_ONCE,
        gradient_accumulation_steps=BATCH // TRL_ROWS_AT_ONCE,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        completion_only_loss=True,
        train_sampling_strategy="group_by_length" if grouped else "sequential",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    ends: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())
            tokens.append(int(state.num_input_tokens_seen))

    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(rows_as_columns),
        processing_class=base.tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    each = np.diff([0, *tokens]).tolist()
    return report(losses, np.diff(ends).tolist(), each, each)


def sgemm_peak() -> float:
    """The most GFLOP/s the machine gives a float32 product: sizes of this model and a square one, best of many."""
    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (1920, 576, 3072), (1920, 3072, 576), (1920, 1536, 576)):
        a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
        for _ in range(20):
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began) / 1e9)
    return best


def main() -> None:
    kind, name, adapter, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    real, sys.stdout = sys.stdout, sys.stderr  # trainers print
    if kind == "adapter":
        make_adapter(adapter)
        result: dict = {}
    elif kind == "peak":
        result = {"gflops": sgemm_peak()}
    else:
        rows = make_rows(name, load_base(BASE).tokenizer)
        runs = {
            "tunesmith": lambda: run_tunesmith(name, rows, adapter, steps),
            "trl": lambda: run_trl(name, rows, adapter, steps, grouped=False),
            "trl-grouped": lambda: run_trl(name, rows, adapter, steps, grouped=True),
        }
        result = runs[kind]()
    print(json.dumps(result), file=real)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
