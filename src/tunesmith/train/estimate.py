"""What a run will take, before it is paid for: tokens, seconds and peak memory, measured on this machine and model."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunesmith.data.batches import Group, Layout, Step, StepPlan, make_step
from tunesmith.models.memory import forget_peak, peak_bytes, resident_bytes
from tunesmith.models.quantised import count_weights
from tunesmith.train import parallel
from tunesmith.train.annotate import Annotate, with_columns
from tunesmith.train.bodies import FusedBody
from tunesmith.train.forward import Body, run_tree
from tunesmith.train.gradient import accumulate
from tunesmith.train.losses import Loss
from tunesmith.train.sharding import ShardedBody
from tunesmith.tree.heads import rows_at_once
from tunesmith.tree.layout import build_tree, inputs
from tunesmith.types import TokenizedExample

LARGEST_BUDGET = 2048  # tokens computed at a time, a longer row aside: beyond that products get no faster
SAMPLED_STEPS = 40  # laid out to count tokens; the rest is as they are
TRIAL_TOKENS = 512
TRIALS = 2
AUTO_SHARE = 0.8  # of the memory that is free
ANSWERING_SHARE = 8  # an eighth of a stated limit
PACKED_SHARE = 3  # a third of the memory
FEW_LEARN = 4  # at most a quarter of the weights
ADAMW_MOMENTS = 2
SPARE = 0.9  # of the memory that may be used, when steps are laid out: what is computed on the way takes some


@dataclass(frozen=True, slots=True)
class Estimate:
    """`tokens` counts every example in full, `computed_tokens` what the model really runs, of all workers together.

    Memory is that of one of `workers` processes, which have the machine's between them.
    """

    steps: int
    tokens: int
    computed_tokens: int
    supervised_tokens: int
    seconds: float
    peak_bytes: int
    bytes_per_token: int  # kept between forward and backward
    token_budget: int  # of one micro-batch
    memory_limit: int  # bytes
    fits: bool
    workers: int = 1


def memory_limit(setting: str, share: float = AUTO_SHARE) -> int:
    """`runtime.memory_limit` in bytes; auto is a share of what this machine has available now."""
    if setting == "auto":
        return int(share * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) + resident_bytes()
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = setting.upper().rstrip("KMGIB ")
    return int(float(number) * units.get(setting.upper().removeprefix(number).strip(), 1))


def answering_limit(setting: str) -> int | None:
    """What keys and values of an engine may take, in bytes; None where `runtime.memory_limit` is auto."""
    return None if setting == "auto" else memory_limit(setting) // ANSWERING_SHARE


def choose_layout(
    body: Body,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[TokenizedExample],
    limit: int,
    *,
    share: bool,
    pack: bool,
    together: int = 1,
) -> Layout | None:
    """How steps are laid out under `limit` bytes; None where not even the longest example fits.

    On a CPU micro-batches run side by side, as many as there are threads, where few weights learn: every lane keeps a
    gradient of its own. A fused body packs the frozen weights where that takes little of the memory; never those of a
    quantised base, which is asked for to save it.
    """
    packed = False
    if isinstance(body, FusedBody) and not body.dequantised_bytes and body.packed_bytes <= limit // PACKED_SHARE:
        body.pack()
        packed = True
    longest = _longest(rows, together, share=share)
    fitting = fitting_tokens(body, parameters, rows, limit)
    if fitting < longest:
        return None
    budget = min(fitting, max(LARGEST_BUDGET, longest))
    lanes = min(_most_lanes(body, parameters), budget // longest) if share else 1
    return Layout(budget, share, pack, lanes, together, packed=packed)


def _most_lanes(body: Body, parameters: Mapping[str, nn.Parameter]) -> int:
    few = sum(p.numel() for p in parameters.values()) * FEW_LEARN <= count_weights(body.model)
    return torch.get_num_threads() if few and body.device.type == "cpu" else 1


def fits_again(body: Body, parameters: Mapping[str, nn.Parameter], steps: StepPlan, limit: int) -> bool:
    """Whether the steps fit as the run laid them out when it was started; packs the weights if it did then."""
    peak = _peak_bytes(body, parameters, _sampled(steps), steps.examples)
    if not steps.layout.packed:
        return peak <= limit
    if not isinstance(body, FusedBody) or peak + body.packed_bytes > limit:
        return False
    body.pack()
    return True


def _longest(rows: Sequence[TokenizedExample], together: int, *, share: bool) -> int:
    """The most tokens that the sequences of one example take."""
    if together == 1:
        return max(len(inputs(row)) for row in rows)
    examples = (rows[i : i + together] for i in range(0, len(rows), together))
    return max(build_tree(example, share=share).tokens for example in examples)


def fitting_tokens(
    body: Body, parameters: Mapping[str, nn.Parameter], rows: Sequence[TokenizedExample], limit: int
) -> int:
    """The most tokens that can be computed at a time under `limit` bytes."""
    return (int(limit * SPARE) - _fixed_bytes(body, parameters)) // bytes_per_token(body, rows)


def bytes_per_token(body: Body, rows: Sequence[TokenizedExample]) -> int:
    """What a token keeps for the backward pass: stated by a fused body, else counted over one trial forward."""
    if isinstance(body, FusedBody):
        return body.decoder.bytes_per_token
    if isinstance(body, ShardedBody):
        return body.bytes_per_token
    row = max(rows, key=lambda row: min(len(row.input_ids), TRIAL_TOKENS))
    short = TokenizedExample(row.example_id, row.input_ids[:TRIAL_TOKENS], row.weights[:TRIAL_TOKENS])
    tree, kept = build_tree([short]), dict[int, int]()

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        batch = run_tree(body, tree, [short])
    weights = {parameter.untyped_storage().data_ptr() for parameter in body.model.parameters()}
    total = sum(size for pointer, size in kept.items() if pointer not in weights)
    del batch
    return max(1, total // tree.tokens)


def estimate(
    body: Body,
    parameters: Mapping[str, nn.Parameter],
    steps: StepPlan,
    loss: Loss,
    annotate: Annotate | None = None,
    *,
    limit: int,
    beside: int = 0,
    held_out: Sequence[TokenizedExample] = (),
) -> Estimate:
    """Count the run's tokens and try a piece of its first step. `steps` is laid out under `limit` already.

    annotate  what goes once over every row that will be seen, and those of `held_out`, before training
    beside    bytes that are held while it trains by what else there is then
    """
    sampled = _sampled(steps)
    times = len(steps) / len(sampled)
    computed = sum(step.computed_tokens for step in sampled) * times
    trial = _try(body, parameters, sampled[0], steps.layout, loss, annotate)
    epochs = len(steps) * steps.batch_examples * steps.layout.together / len(steps.examples)
    together, share = steps.layout.together, steps.layout.share
    noted = (held_out[i : i + together] for i in range(0, len(held_out), together))
    once = computed / max(1.0, epochs) + sum(build_tree(rows, share=share).tokens for rows in noted)
    each = bytes_per_token(body, steps.examples)
    peak = trial.peak_bytes + ADAMW_MOMENTS * _trained_bytes(parameters) + (_held(sampled) - trial.held) * each + beside
    return Estimate(
        steps=len(steps),
        tokens=round(sum(step.tokens for step in sampled) * times),
        computed_tokens=round(computed),
        supervised_tokens=round(sum(step.supervised_tokens for step in sampled) * times),
        seconds=computed * trial.step_rate + once * trial.once_rate,
        peak_bytes=peak,
        bytes_per_token=each,
        token_budget=steps.layout.token_budget,
        memory_limit=limit,
        fits=peak <= limit,
        workers=steps.layout.workers,
    )


def _sampled(steps: StepPlan) -> list[Step]:
    count = min(SAMPLED_STEPS, len(steps))
    return [steps[i * len(steps) // count] for i in range(count)]


def _peak_bytes(
    body: Body, parameters: Mapping[str, nn.Parameter], steps: Sequence[Step], rows: Sequence[TokenizedExample]
) -> int:
    """The most memory that these steps take, as they are laid out."""
    return _fixed_bytes(body, parameters) + _held(steps) * bytes_per_token(body, rows)


def _held(steps: Sequence[Step]) -> int:
    """The most tokens that are between forward and backward at a time."""
    return max(_held_tokens(group, step.lanes) for step in steps for group in step.groups)


def _held_tokens(group: Group, lanes: int) -> int:
    """The prefix's and those of as many trees as there are lanes."""
    prefix = 0 if group.prefix is None else group.prefix.tokens
    return prefix + sum(sorted(tree.tokens for tree in group.trees)[-lanes:])


@dataclass(frozen=True, slots=True)
class _Trial:
    """What forward and backward of a few rows took."""

    step_rate: float  # seconds for each token computed
    once_rate: float  # of what goes before training
    peak_bytes: int  # with gradients, without AdamW's moments
    held: int  # tokens


def _try(
    body: Body,
    parameters: Mapping[str, nn.Parameter],
    first: Step,
    layout: Layout,
    loss: Loss,
    annotate: Annotate | None,
) -> _Trial:
    """A few rows of the first step, several times: the first warms up, and of the others the quickest is told, since
    what else goes on in a machine only ever adds."""
    count = layout.together
    trial = make_step(0, 0.0, first.examples[:count], layout)
    while trial.computed_tokens < TRIAL_TOKENS and count < len(first.examples):
        count += layout.together
        trial = make_step(0, 0.0, first.examples[:count], layout)
    seconds, before = list[float](), list[float]()
    for _ in range(1 + TRIALS):
        if annotate is not None:
            began = time.perf_counter()
            columns = annotate(body, trial.examples, layout, lambda done, total: None)
            before.append(time.perf_counter() - began)
            trial = make_step(0, 0.0, [*with_columns(trial.examples, columns)], layout)
        forget_peak(body.device)
        began = time.perf_counter()
        accumulate(body, trial, loss)
        seconds.append(time.perf_counter() - began)
    peak = peak_bytes(body.device)
    for parameter in parameters.values():
        parameter.grad = None
    body.rest()
    tokens = trial.computed_tokens
    step_rate, once_rate = (min(each[1:], default=0.0) / tokens for each in (seconds, before))
    return _Trial(step_rate, once_rate, peak, _held([trial]))


def _trained_bytes(parameters: Mapping[str, nn.Parameter]) -> int:
    """Of what this worker holds of the parameters."""
    return sum(parallel.local(p).numel() * p.element_size() for p in parameters.values())


def _fixed_bytes(body: Body, parameters: Mapping[str, nn.Parameter]) -> int:
    """What does not grow with the micro-batch: what is held now, gradient and moments, every lane's own gradient and
    slice of logits, what every thread dequantises of a quantised base, and what is gathered of a sharded one."""
    trained = _trained_bytes(parameters)
    lanes = _most_lanes(body, parameters)
    apart = lanes * trained if lanes > 1 else 0
    gathered = body.gathered_bytes if isinstance(body, ShardedBody) else 0
    dequantised = body.dequantised_bytes * torch.get_num_threads() if isinstance(body, FusedBody) else 0
    vocabulary = body.head.weight.shape[0]
    logits = lanes * 2 * rows_at_once(vocabulary) * vocabulary * 4
    return resident_bytes() + (1 + ADAMW_MOMENTS) * trained + apart + logits + gathered + dequantised
