"""Experts side by side on the cores of a CPU.

Small matrix products do not fill several cores: 256 products of 32 rows take 76 ms on two threads that share
each product, 84 ms on one, 43 ms when each thread has experts of its own.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch
from torch import Tensor

_ROWS_PER_EXPERT = 20  # reading and packing an expert's weights costs about as much as this many of its rows
_SMALLEST_SHARE = (
    1 << 20
)  # bytes of weights, read in about 100 us; below this, a thread costs more than it saves
_WORST_IMBALANCE = 1.3  # largest share over mean; above it, threads that share each product do better
_MOST_SHARES = 8  # each has a sum of its own, as large as y


def split_experts(bounds: Sequence[int], device: torch.device, bytes_of_expert: int = 1 << 18) -> list[range]:
    """Cut experts 0..e-1 into ranges of similar work, one for each thread; one range where that does not pay.

    bounds (e+1): expert i owns rows bounds[i] to bounds[i+1] - 1. bytes_of_expert: the size of its weights.
    """
    everything = range(len(bounds) - 1)
    smallest = max(1, _SMALLEST_SHARE * _ROWS_PER_EXPERT // max(bytes_of_expert, 1))  # in rows
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1 or bounds[-1] * (1 + _ROWS_PER_EXPERT) < 2 * smallest:
        return [everything]
    work = [bounds[i + 1] - bounds[i] + _ROWS_PER_EXPERT * (bounds[i + 1] > bounds[i]) for i in everything]
    total = sum(work)
    threads = min(threads, _MOST_SHARES, total // smallest)
    if threads < 2:
        return [everything]
    cuts, done = [0], 0
    for expert, amount in enumerate(work):
        if len(cuts) < threads and done + amount / 2 > len(cuts) * total / threads:
            cuts.append(expert)
        done += amount
    ranges = [range(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(work)], strict=True)]
    largest = max(sum(work[i] for i in own) for own in ranges)
    return (
        ranges if len(ranges) == threads and largest * threads <= _WORST_IMBALANCE * total else [everything]
    )


def sum_over_shares(
    work: Callable[[Tensor, range], None], ranges: Sequence[range], zeros: Callable[[], Tensor]
) -> Tensor:
    """Run work(total, experts) for each range of experts, in a thread of its own if there are several.

    Every call adds to a total of its own, made by `zeros`; the totals are summed in the order of the ranges,
    so the same ranges give the same bits.
    """
    totals = [zeros() for _ in ranges]
    if len(ranges) == 1:
        work(totals[0], ranges[0])
        return totals[0]

    is_inference = torch.is_inference_mode_enabled()

    def run(total: Tensor, experts: range) -> None:
        with torch.inference_mode(is_inference), torch.no_grad():  # modes are a thread's own
            work(total, experts)

    pool = _threads(min(torch.get_num_threads(), _MOST_SHARES))
    list(pool.map(run, totals, ranges))
    for other in totals[1:]:
        totals[0] += other
    return totals[0]


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    """Threads in which torch itself uses one core."""
    torch_threads = torch.get_num_threads()
    barrier = Barrier(number + 1)

    def use_one_core() -> None:
        torch.get_num_threads()  # a thread takes torch's default on first use, which would undo the next line
        torch.set_num_threads(1)
        barrier.wait()

    pool = ThreadPoolExecutor(number, thread_name_prefix="moe-experts", initializer=use_one_core)
    try:
        for _ in range(number):
            pool.submit(int)
        barrier.wait()
    except BaseException:
        barrier.abort()  # else the threads that did start would wait for ever
        raise
    finally:
        torch.set_num_threads(torch_threads)  # the default that later threads of the program start with
    return pool


if hasattr(os, "register_at_fork"):  # threads do not survive a fork, and Windows has none
    os.register_at_fork(after_in_child=_threads.cache_clear)
