"""One cell: every candidate is checked, then timed in turns, forward and forward + backward."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_candidates import COMPILED, DENSE, Candidate, DenseProducts, make, why_absent
from benchmarks.gpu_cells import FEW_TOKENS, NAMED, Cell, key, participants, why_not_memory, why_not_time
from benchmarks.gpu_passes import measure_operations, measure_passes
from benchmarks.gpu_problem import (
    Expected,
    Problem,
    check_forward,
    check_gradients,
    expected_of,
    make_problem,
)
from benchmarks.gpu_timing import (
    Budget,
    Stopwatch,
    captured,
    failure_of,
    kept_bytes,
    peak_bytes,
    poison,
    time_in_turns,
)

FORWARD, BOTH = "forward", "forward + backward"
TRAINING = "forward of a training step"  # keeps what the backward needs; what SonicMoE's figure shows


@dataclass(slots=True)
class Bench:
    """What all cells share: the device, the time that is left, who has tuned itself, whom to leave out.

    tuned and compiled hold (candidate, shape); banned (candidate, cell in words) -> why.
    """

    watch: Stopwatch
    dtype: torch.dtype
    total_memory: float
    budget: Budget
    deadline: float
    tuned: set[tuple[str, str]] = field(default_factory=set)
    compiled: set[tuple[str, str]] = field(default_factory=set)
    banned: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()


Result = dict[str, Any]


def measure(cell: Cell, bench: Bench) -> Result:
    """Everything about one cell as plain data."""
    torch.manual_seed(0)
    item, began = bench.dtype.itemsize, time.perf_counter()
    result: Result = {"cell": key(cell), "skipped": {}}
    for backward in (False, True):
        if reason := why_not_memory(cell, bench.total_memory, backward=backward, item=item):
            result["skipped"][BOTH if backward else FORWARD] = reason
    if FORWARD not in result["skipped"] and (cell.kind == "layer" or not result["skipped"]):
        reason = failure_of(lambda: _fill(cell, result, bench), bench.watch, "ours")
        if reason is not None:
            result["skipped"]["the cell"] = reason
    return result | {"seconds": round(time.perf_counter() - began, 1)}


def _fill(cell: Cell, result: Result, bench: Bench) -> None:
    problem = make_problem(
        NAMED[cell.shape], cell.tokens, zipf=cell.zipf, device=bench.watch.device, dtype=bench.dtype
    )
    result |= {"active": problem.active, "max_violation": problem.max_violation}
    if cell.kind == "passes":
        result["passes"] = measure_passes(problem, bench.watch, bench.budget)
    elif cell.kind == "operations":
        result["operations"] = measure_operations(problem, bench.watch, bench.budget)
    else:
        measure_layer(cell, problem, result, bench)


def measure_layer(cell: Cell, problem: Problem, result: Result, bench: Bench) -> None:
    """Fill in timings by mode, memory, and who has no row for which reason."""
    modes = [FORWARD] if BOTH in result["skipped"] else [FORWARD, BOTH]
    modes += [TRAINING] if cell.is_sonic and BOTH in modes else []
    expected = expected_of(problem)
    candidates = _admitted(cell, problem, expected, BOTH in modes, result, bench)
    del expected
    result |= {"timings": {}, "graphs": {}, "memory": {}}
    for mode in modes:
        _time(mode, candidates, cell, problem, result, bench)
    if BOTH in modes and cell.tokens > FEW_TOKENS:
        for candidate in candidates:
            found = _memory_of(candidate, problem, bench)
            if found is not None:
                result["memory"][candidate.name] = found
    if cell.tokens <= FEW_TOKENS and bench.watch.on_gpu:
        for mode in modes:
            _time_graphs(mode, candidates, problem, result, bench)


def _admitted(
    cell: Cell, problem: Problem, expected: Expected, backward: bool, result: Result, bench: Bench
) -> list[Candidate]:
    """Who can be made, has time to tune itself, and is right in value and gradients."""
    admitted, skipped = [], result["skipped"]
    for name in participants(cell):
        if name == DENSE:
            continue
        reason = _why_not(name, cell, bench)
        if reason is None:
            began, made = time.perf_counter(), []
            reason = failure_of(
                lambda name=name, made=made: made.append(_checked(name, problem, expected, backward, bench)),
                bench.watch,
                name,
            )
            result.setdefault("first_run_s", {})[name] = round(time.perf_counter() - began, 1)
            if name != COMPILED:  # which compiles every size anew
                bench.tuned.add((name, cell.shape))
            admitted += made
        if reason is not None:
            skipped[name] = reason
    return admitted


def _why_not(name: str, cell: Cell, bench: Bench) -> str | None:
    """Why a candidate is not even tried, or None."""
    its_own = name, cell.shape
    tuned, compiled = its_own in bench.tuned, its_own in bench.compiled
    return (
        why_absent(name, NAMED[cell.shape])
        or bench.banned.get((name, str(cell)))
        or why_not_time(name, tuned=tuned, compiled=compiled, left_s=bench.left_s)
    )


def _checked(name: str, problem: Problem, expected: Expected, backward: bool, bench: Bench) -> Candidate:
    candidate = make(name, problem.shape)
    poison(int(16 * problem.experts.numel() * (problem.shape.h + problem.shape.d)), bench.watch)
    with torch.no_grad():
        check_forward(expected, candidate.run(problem), name)
    if backward:
        leaves = problem.leaves
        gradients = torch.autograd.grad(candidate.run(problem), list(leaves.values()), expected.upstream)
        check_gradients(expected, dict(zip(leaves, gradients, strict=True)), name)
    return candidate


def work_of(candidate: Candidate, problem: Problem, mode: str) -> Callable[[], object]:
    """A call without arguments: the forward without or with gradients, or forward and backward."""

    def forward() -> Tensor:
        with torch.no_grad():
            return candidate.run(problem)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(candidate.run(problem), list(problem.leaves.values()), problem.upstream)

    return {FORWARD: forward, TRAINING: lambda: candidate.run(problem), BOTH: both}[mode]


def _time(
    mode: str, candidates: list[Candidate], cell: Cell, problem: Problem, result: Result, bench: Bench
) -> None:
    works = {candidate.name: work_of(candidate, problem, mode) for candidate in candidates}
    dense: list[DenseProducts] = []

    def make_dense() -> None:
        dense.append(DenseProducts(problem.shape, problem.experts.numel(), problem.x.device, problem.x.dtype))

    if (reason := failure_of(make_dense, bench.watch, DENSE)) is None:
        works = {DENSE: dense[0].work(backward=mode == BOTH)} | works
    else:
        result["skipped"][f"{DENSE}, {mode}"] = reason
    timings, failed = time_in_turns(works, bench.watch, bench.budget, queued=cell.tokens > FEW_TOKENS)
    result["timings"][mode] = {name: asdict(timing) for name, timing in timings.items()}
    result["skipped"] |= {f"{name}, {mode}": reason for name, reason in failed.items()}


def _time_graphs(
    mode: str, candidates: list[Candidate], problem: Problem, result: Result, bench: Bench
) -> None:
    """The same as CUDA graphs, last in a cell: a capture that fails can spoil what comes after it."""
    graphs: dict[str, Callable[[], object]] = {}
    for candidate in candidates:
        label, work = f"{candidate.name}, {mode}, graph", work_of(candidate, problem, mode)
        if candidate.graph is not None:
            result["skipped"][label] = candidate.graph
            continue
        reason = failure_of(
            lambda name=candidate.name, work=work: graphs.update({name: captured(work, bench.watch)}),
            bench.watch,
            candidate.name,
        )
        if reason is not None:
            result["skipped"][label] = reason
    timings, failed = time_in_turns(graphs, bench.watch, bench.budget, queued=True)
    result["graphs"][mode] = {name: asdict(timing) for name, timing in timings.items()}
    result["skipped"] |= {f"{name}, {mode}, graph": reason for name, reason in failed.items()}


def _memory_of(candidate: Candidate, problem: Problem, bench: Bench) -> dict[str, int] | None:
    """Bytes kept for the backward, x included, and the peak of forward + backward; None if not to be had."""
    found: list[int | None] = []

    def step() -> None:
        found.append(kept_bytes(lambda: candidate.run(problem), bench.watch))
        found.append(peak_bytes(work_of(candidate, problem, BOTH), bench.watch))

    if failure_of(step, bench.watch, candidate.name) is not None or None in found:
        return None
    kept, peak = found
    assert kept is not None and peak is not None
    return {"kept": kept + problem.x.nbytes, "peak": peak}


def release(bench: Bench) -> None:
    """Give the memory of a cell back before the next one."""
    gc.collect()
    if bench.watch.on_gpu:
        torch.cuda.empty_cache()
