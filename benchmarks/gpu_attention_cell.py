"""One size of benchmarks.gpu_attention: every candidate is checked, then timed in turns."""

import gc
from dataclasses import asdict
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from benchmarks.accuracy import WrongResultError
from benchmarks.gpu_attention_peers import (
    Attend,
    make_alternatives,
    make_candidates,
    make_problem,
    sampled_truth,
)
from benchmarks.gpu_problem import complain
from benchmarks.gpu_timing import Budget, Stopwatch, failure_of, time_in_turns
from moe_triton.attention_schedule import choose_schedule
from moe_triton.launch import target_of

Result = dict[str, Any]


@torch.no_grad()
def measure(cell: Any, watch: Stopwatch, dtype: torch.dtype, budget: Budget, *, tiles: bool) -> Result:
    """Timings and errors by candidate; a reason for each that is wrong or fails, and so has no speed."""
    torch._dynamo.reset()  # each size compiles FlexAttention anew, and dynamo counts how often
    found = _measure(cell, watch, dtype, budget, tiles=tiles)
    gc.collect()
    if watch.on_gpu:
        torch.cuda.empty_cache()
    return found


def _measure(cell: Any, watch: Stopwatch, dtype: torch.dtype, budget: Budget, *, tiles: bool) -> Result:
    problem = make_problem(**asdict(cell), device=watch.device, dtype=dtype)
    candidates = make_candidates(problem) | (make_alternatives(problem) if tiles else {})
    truth = sampled_truth(problem)
    errors, skipped = {}, {}
    for name, attend in candidates.items():
        reason = failure_of(lambda n=name, a=attend: errors.update({n: checked(a, *truth)}), watch, name)
        if reason is not None:
            skipped[name] = reason
    works = {name: attend for name, attend in candidates.items() if name not in skipped}
    timings, failed = time_in_turns(works, watch, budget, queued=True)
    target, rows = target_of(watch.device), problem.queries[..., 0].numel()
    return {
        "flops": problem.flops,
        "bytes": problem.bytes,
        "schedule": asdict(choose_schedule(target, dtype, rows, 1, cell.keys, cell.channels)),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "errors": errors,
        "skipped": skipped | failed,
    }


def checked(attend: Attend, chosen: Tensor, truth: Tensor, fused: Tensor) -> float:
    """The largest error of the chosen rows over the largest number of their truth.

    Raises:
        WrongResultError: it errs by more than twice as much as rounded weights make it, plus an ulp.
    """
    out = rearrange(attend(), "b n s c -> (b n s) c")[chosen]
    if complaint := complain(out, fused, truth):
        raise WrongResultError(complaint)
    return ((out.double() - truth).abs().max() / truth.abs().max()).item()
