"""Where the time of our own layer goes: every launch between two events, and the operations of level 1."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_candidates import OURS_SORTED, make
from benchmarks.gpu_problem import Problem
from benchmarks.gpu_timing import Budget, Stopwatch, time_in_turns
from benchmarks.roofline import Work, works

HEAD_START = 10  # writings of the flushed buffer before a step: about a millisecond, the CPU gets ahead


@dataclass(slots=True)
class Launch:
    """One launch of a kernel of ours: in which phase, which kernel, and its seconds once the GPU is done."""

    phase: str
    kernel: str
    seconds: Callable[[], float]


class Recorder:
    """Collects the launches of moe_triton while it is `recording`."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.phase = "forward"
        self.launches: list[Launch] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Put two events around every launch."""
        import moe_triton.launch as launching

        original = launching.run

        def run(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], **options: int) -> None:
            stop = self.watch.start()
            original(kernel, grid, arguments, **options)
            self.launches.append(Launch(self.phase, kernel_name(kernel), stop()))

        launching.run = run
        try:
            yield
        finally:
            launching.run = original


def kernel_name(kernel: Any) -> str:
    """The name of the function under all decorators."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel.__name__


def pass_names(launches: list[tuple[str, str]]) -> list[str]:
    """The pass to which each (phase, kernel) in order of launch belongs, or the kernel's own name.

    A product over rows is the down-projection on the way forth and the gradient of the rows on the way back;
    a sum of rows combines or reduces; of the gradients of weights W_down's comes first.
    """
    names, weights = [], 0
    for phase, kernel in launches:
        is_forward = phase == "forward"
        name = kernel.removesuffix("_kernel")
        if name == "linear":
            name = "down" if is_forward else "grad_rows"
        elif name == "sum":
            name = "combine" if is_forward else "reduce"
        elif name == "grad_weight":
            weights += 1
            name = "grad_down" if weights == 1 else "grad_up"
        names.append(name)
    return names


def measure_passes(problem: Problem, watch: Stopwatch, budget: Budget) -> dict[str, dict[str, Any]]:
    """Median milliseconds of each pass of ours in a forward and backward, with its operations and bytes."""
    run = make(OURS_SORTED, problem.shape).run
    leaves = list(problem.leaves.values())
    taken: dict[str, list[float]] = {}
    for number in range(budget.warmups + 4 * budget.min_rounds):
        recorder = Recorder(watch)
        watch.flush(HEAD_START)
        with recorder.recording():
            y = run(problem)
            recorder.phase = "backward"
            torch.autograd.grad(y, leaves, problem.upstream)
        watch.synchronize()
        if number >= budget.warmups:
            for name, seconds in _by_pass(recorder.launches).items():
                taken.setdefault(name, []).append(seconds)
    ideal = works(problem.shape, len(problem.x), item=problem.x.element_size(), active=problem.active)
    nothing = Work("", 0.0, 0.0)
    return {
        name: {
            "ms": 1e3 * median(seconds),
            "flops": ideal.get(name, nothing).flops,
            "bytes": ideal.get(name, nothing).bytes,
        }
        for name, seconds in taken.items()
    }


def _by_pass(launches: list[Launch]) -> dict[str, float]:
    names = pass_names([(launch.phase, launch.kernel) for launch in launches])
    sums: dict[str, float] = {}
    for name, launch in zip(names, launches, strict=True):
        sums[name] = sums.get(name, 0.0) + launch.seconds()
    return sums


@torch.no_grad()
def measure_operations(problem: Problem, watch: Stopwatch, budget: Budget) -> dict[str, dict[str, Any]]:
    """The operations of level 1 at this size: their time, operations and bytes, or why they have none."""
    steps = operations(problem)
    calls = {name: step for name, (step, _) in steps.items()}
    timings, failed = time_in_turns(calls, watch, budget, queued=True)
    return {
        name: {"ms": timings[name].ms, "flops": work.flops, "bytes": work.bytes}
        if name in timings
        else {"failed": failed[name]}
        for name, (_, work) in steps.items()
    }


def operations(problem: Problem) -> dict[str, tuple[Callable[[], object], Work]]:
    """Each operation as a call without arguments, with what it must compute and move."""
    import moe_triton as ops

    shape, plan, x = problem.shape, problem.plan, problem.x.detach()
    d, h, k, t = shape.d, shape.h, shape.k, len(x)
    p, item, offsets = t * k, x.element_size(), plan.offsets
    up_proj, weights = problem.up_proj.detach(), problem.weights.detach()
    rows = ops.dispatch(x, plan.pair_of_row, plan.row_of_pair, k)
    pre = ops.grouped_linear(rows, up_proj, offsets)
    product, read = 4.0 * p * d * h, problem.active * 2 * d * h

    def work(flops: float, numbers: float) -> Work:
        return Work("", flops, item * numbers)

    return {
        "sort_by_expert": (
            lambda: ops.sort_by_expert(problem.experts, shape.e),
            Work("", 0.0, 8.0 * (3 * p + shape.e)),
        ),
        "dispatch": (
            lambda: ops.dispatch(x, plan.pair_of_row, plan.row_of_pair, k),
            work(0.0, t * d + p * d),
        ),
        "combine": (
            lambda: ops.combine(rows, weights, plan.row_of_pair, offsets),
            work(2.0 * p * d, p * d + t * d),
        ),
        "activate": (
            lambda: ops.activate(pre, problem.activation, interleaved=shape.gpt_oss),
            work(0.0, 3 * p * h),
        ),
        "grouped_linear": (
            lambda: ops.grouped_linear(rows, up_proj, offsets),
            work(product, p * d + read + 2 * p * h),
        ),
        "grouped_linear_grad_rows": (
            lambda: ops.grouped_linear_grad_rows(pre, up_proj, offsets),
            work(product, p * d + read + 2 * p * h),
        ),
        "grouped_linear_grad_weight": (
            lambda: ops.grouped_linear_grad_weight(pre, rows, offsets),
            work(product, p * d + 2 * p * h + shape.e * 2 * d * h),
        ),
    }
