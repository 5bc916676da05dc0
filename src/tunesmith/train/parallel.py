"""Several processes, one run: every worker computes its part of each step, and all go on with the same sums.

Who each process is stands in the environment, where torchrun (or `tunesmith.workers`, for `runtime.workers`) puts it.
A loss is a sum and a step knows its weight beforehand, so N workers have the gradient of one: the sums are added up in
the order of the workers, in float32, whatever the backend, and every worker has the same bytes. Outside a team every
function here does what it does for a team of one: nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.errors import LostWorkerError

PATIENCE = timedelta(hours=1)  # how long a worker waits for the others, which may be writing or answering
LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "socket")


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process is the first of those started together, or the only one; in a team or not."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def team(device: torch.device | None = None) -> Iterator[None]:
    """Join the other workers, where this process is one of several, and leave them at the end.

    device  what is computed on, where that is not the CPU: each worker of a machine takes one of its own.
    Raises LostWorkerError in place of what a backend says where another worker is gone.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    here = int(os.environ.get("LOCAL_RANK", "0"))
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(here)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE, device_id=torch.device("cuda", here))
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size()))
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in LOST):
            raise
        raise LostWorkerError("another worker of this run was lost, and this one stopped with it") from error
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_size() -> int:
    """How many workers share this machine and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the worker that writes what the run leaves."""
    return rank() == 0


def gather(value: Any) -> list[Any]:
    """What every worker says, in their order; plain JSON values. All must call."""
    if size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.empty(1, dtype=torch.long) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(text)]))
    longest = max(int(length) for length in lengths)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(size())]
    dist.all_gather(texts, torch.cat((text, text.new_zeros(longest - len(text)))))
    return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]


def wait() -> None:
    """Go on when all have come here."""
    gather(None)


def from_first(make: Callable[[], Any]) -> Any:
    """What the first worker makes of it, for all: a plain JSON value."""
    return gather(make() if is_first() else None)[0]


def add_up(total: float, metrics: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """A loss and its metrics, summed over the workers' parts."""
    everyone = gather([total, dict(metrics)])
    names = dict.fromkeys(name for _, each in everyone for name in each)
    return sum(each for each, _ in everyone), {n: sum(each.get(n, 0.0) for _, each in everyone) for n in names}


def add_up_array(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The sum of the workers' arrays."""
    if size() == 1:
        return values
    parts = [torch.empty(values.shape, dtype=torch.float64) for _ in range(size())]
    dist.all_gather(parts, torch.from_numpy(values.astype(np.float64)))
    return _in_order(parts).numpy().astype(values.dtype)


def add_up_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by the sum over the workers, one that a worker lacks counting as zero.

    Each worker adds up one stretch of all gradients, in the workers' order and in float32, and gives it to the others:
    what an all-reduce moves, 2 (N - 1) / N of the gradients' size, but summed in an order that nothing can change.
    Parameters whose weights are sharded are left out: FSDP adds theirs up on the way back.
    """
    whole = [p for p in parameters if not is_sharded(p)]
    if size() == 1 or not whole:
        return
    for parameter in whole:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    dtype = torch.promote_types(whole[0].dtype, torch.float32)
    flat = torch.cat([p.grad.flatten().to(dtype) for p in whole if p.grad is not None])
    stretch = -(-len(flat) // size())
    flat = torch.cat((flat, flat.new_zeros(stretch * size() - len(flat))))
    mine = torch.empty_like(flat)
    dist.all_to_all_single(mine, flat)
    dist.all_gather(list(flat.view(size(), stretch).unbind()), _in_order(mine.view(size(), stretch).unbind()))
    start = 0
    for parameter in whole:
        assert parameter.grad is not None
        parameter.grad.copy_(flat[start : start + parameter.numel()].view(parameter.shape))
        start += parameter.numel()


def seed(seed: int, step: int) -> None:
    """Each worker draws its own random numbers, the same whenever that step is run; one alone goes on with its own."""
    if size() > 1:
        torch.manual_seed((seed * 1_000_003 + step) * size() + rank())


def is_sharded(tensor: Tensor) -> bool:
    """Whether this worker holds only a part of it (a DTensor)."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of it that this worker holds; all of it where it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
