"""Micro-batches of a step side by side, each in a thread of its own with its share of the cores.

On a CPU two halves of a step on one core each are done sooner than the whole on both: what lies between the products
(norms, activations, attention of short rows, the interpreter) runs side by side too. PyTorch lets go of the
interpreter's lock in every operation. Results come back in their order, so that sums are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(jobs: Sequence[Callable[[], T]], lanes: int) -> Iterator[T]:
    """The jobs' results in order, each as soon as it is there; at most `lanes` jobs run at a time.

    Raises what the first failing job raised.
    """
    if lanes == 1 or len(jobs) == 1:
        yield from (job() for job in jobs)
        return
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    share = max(1, threads // lanes)

    def run(job: Callable[[], T]) -> T:
        torch.set_num_threads(share)
        with torch.set_grad_enabled(grad):
            return job()

    torch.set_num_threads(share)  # for what the caller does with a result: other lanes go on meanwhile
    try:
        yield from _pool(lanes).map(run, jobs)
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(lanes: int) -> ThreadPoolExecutor:
    # Denormal numbers are a hundred times slower on a CPU; how they are treated is a thread's own setting.
    return ThreadPoolExecutor(lanes, "lane", initializer=torch.set_flush_denormal, initargs=(True,))
