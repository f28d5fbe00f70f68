"""Time on a GPU between two events, candidates in turns, with a cold L2 cache; and what a call keeps.

Before each run a buffer larger than the cache is written. `queued` runs are launched while that writing goes
on, as in a training step where the CPU is ahead; the others start on an idle GPU and pay for their launches.
"""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResultError
from benchmarks.measure import Timing

Works = Mapping[str, Callable[[], object]]
FLUSHED_BYTES = 256 << 20  # several times the L2 of any GPU of today
# What a candidate's own code may raise: it loses its row, with the reason, and the run goes on.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    OSError,
    *((import_module("triton.errors").TritonError,) if find_spec("triton") else ()),
    WrongResultError,
)


class DeadDeviceError(Exception):
    """The GPU answers every call with an error: this process cannot go on. Says after which candidate."""

    def __init__(self, candidate: str, reason: str) -> None:
        super().__init__(f"{candidate}: {reason}")
        self.candidate, self.reason = candidate, reason


@dataclass(frozen=True, slots=True)
class Budget:
    """At least `warmups` runs before the first that counts, then rounds for `seconds`, within the limits."""

    seconds: float = 1.0
    warmups: int = 10
    min_rounds: int = 5
    max_rounds: int = 100


class Stopwatch:
    """Starts and stops around a piece of work; the times are read later, so that nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.buffer = torch.empty(FLUSHED_BYTES if self.on_gpu else 1, dtype=torch.int8, device=device)

    def flush(self, times: int = 1) -> None:
        """Empty the cache; many times also keep the GPU busy for a while."""
        for _ in range(times):
            self.buffer.zero_()

    def run(self, work: Callable[[], object], *, queued: bool) -> Callable[[], float]:
        """Do the work; what is returned tells its seconds, after `synchronize`."""
        self.flush()
        if not queued:
            self.synchronize()
        stop = self.start()
        work()
        return stop()

    def start(self) -> Callable[[], Callable[[], float]]:
        """Begin; call the result to end, and the result of that, after `synchronize`, for the seconds."""
        if not self.on_gpu:
            begin = time.perf_counter()

            def stop_clock() -> Callable[[], float]:
                seconds = time.perf_counter() - begin
                return lambda: seconds

            return stop_clock
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()

        def stop() -> Callable[[], float]:
            last.record()
            return lambda: first.elapsed_time(last) / 1e3

        return stop

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def time_in_turns(
    works: Works, watch: Stopwatch, budget: Budget, *, queued: bool
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings, and why a candidate has none.

    Raises:
        DeadDeviceError: a candidate's failure is one that no later call survives.
    """
    failed: dict[str, str] = {}
    taken: dict[str, list[float]] = {name: [] for name in works}

    def attempt(name: str, step: Callable[[], object]) -> None:
        if name not in failed and (reason := failure_of(step, watch, name)) is not None:
            failed[name] = reason

    def warm_up(work: Callable[[], object]) -> None:
        for _ in range(budget.warmups):
            work()
        watch.synchronize()

    gc.collect()
    gc.disable()
    try:
        for name, work in works.items():
            attempt(name, lambda work=work: warm_up(work))
        started, rounds = time.perf_counter(), 0
        while len(failed) < len(works) and _goes_on(rounds, time.perf_counter() - started, budget):
            first = rounds % len(works)
            names = [*list(works)[first:], *list(works)[:first]]
            readings: list[tuple[str, Callable[[], float]]] = []
            for name in names:
                attempt(name, lambda n=name, r=readings: r.append((n, watch.run(works[n], queued=queued))))
            if (reason := failure_of(watch.synchronize, watch, "one of " + ", ".join(names))) is not None:
                raise DeadDeviceError(names[0], reason)
            for name, seconds in readings:
                taken[name].append(seconds())
            rounds += 1
    finally:
        gc.enable()
    return {name: Timing.of(taken[name]) for name in works if name not in failed}, failed


def _goes_on(rounds: int, seconds: float, budget: Budget) -> bool:
    return rounds < budget.min_rounds or (rounds < budget.max_rounds and seconds < budget.seconds)


def failure_of(step: Callable[[], object], watch: Stopwatch, candidate: str) -> str | None:
    """Let a candidate do something; why it failed, in one line, or None.

    Raises:
        DeadDeviceError: after the failure the GPU does not answer any more.
    """
    try:
        step()
    except FAILURES as error:
        reason = in_one_line(error)
    else:
        return None
    gc.collect()
    try:
        watch.synchronize()
        if watch.on_gpu:
            torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeadDeviceError(candidate, reason) from error
    return reason


def in_one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, WrongResultError):
        return f"wrong: {error}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def captured(work: Callable[[], object], watch: Stopwatch) -> Callable[[], object]:
    """The work as a CUDA graph; call it to replay. What the work allocates lives as long as the graph."""
    side = torch.cuda.Stream(watch.device)
    side.wait_stream(torch.cuda.current_stream(watch.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream(watch.device).wait_stream(side)
    watch.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def dense_flops_per_second(watch: Stopwatch, dtype: torch.dtype) -> float:
    """The median rate of one large square matrix product on random numbers: the roof of this very GPU."""
    n = 8192 if watch.on_gpu else 256
    a, b = (torch.randn(n, n, device=watch.device).to(dtype) for _ in range(2))
    timings, failed = time_in_turns({"product": lambda: a @ b}, watch, Budget(0.3, 10, 10, 100), queued=True)
    if failed:
        raise RuntimeError(f"a matrix product of {n} x {n} failed: {failed['product']}")
    return 2 * n**3 / (timings["product"].ms / 1e3)


def kept_bytes(forward: Callable[[], Tensor], watch: Stopwatch) -> int | None:
    """Bytes that a forward pass holds for its backward, without its inputs and output; None on a CPU."""
    if not watch.on_gpu:
        return None
    gc.collect()
    watch.synchronize()
    before = torch.cuda.memory_allocated(watch.device)
    y = forward()
    watch.synchronize()
    return torch.cuda.memory_allocated(watch.device) - before - y.nbytes


def peak_bytes(work: Callable[[], object], watch: Stopwatch) -> int | None:
    """Most bytes that the work holds at once beyond what was there before; None on a CPU."""
    if not watch.on_gpu:
        return None
    gc.collect()
    watch.synchronize()
    before = torch.cuda.memory_allocated(watch.device)
    torch.cuda.reset_peak_memory_stats(watch.device)
    work()
    watch.synchronize()
    return torch.cuda.max_memory_allocated(watch.device) - before


def poison(size: int, watch: Stopwatch) -> None:
    """Leave NaN in memory that the next allocations are likely to get."""
    if watch.on_gpu:
        free, _ = torch.cuda.mem_get_info(watch.device)
        block = torch.empty(min(size, free // 2) // 4, dtype=torch.float32, device=watch.device)
        block.fill_(float("nan"))
