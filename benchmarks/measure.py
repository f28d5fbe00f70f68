"""Time and memory of several candidates, side by side.

Candidates are timed in turns, one run each a round: whatever slows the machine down for a while slows all of
them, and a ratio of two medians survives it. Their order moves by one place every round.
"""

import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Prepare = Callable[[int], Callable[[], object]]  # round number -> the work to be timed; its own cost is not

SLOW_RUN_S = 1.0  # a candidate whose runs take longer, and far longer than the fastest's, ...
SLOW_RATIO = 8.0  # ... is run only once, after one warm-up


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to time one cell: `warmups` rounds, then rounds for `seconds`, within the limits."""

    seconds: float = 2.0
    warmups: int = 2
    min_rounds: int = 3
    max_rounds: int = 50


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one run: the median and the 20th and 80th percentile of `runs` runs."""

    ms: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Summarise the times of some runs."""
        ordered = sorted(1e3 * s for s in seconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered)
        )

    def __str__(self) -> str:
        """Such as 12.3 (12.1-12.9), with three digits each."""
        return f"{digits(self.ms)} ({digits(self.p20)}-{digits(self.p80)})"


def time_in_turns(
    candidates: Mapping[str, Prepare], device: torch.device, budget: Budget
) -> dict[str, Timing]:
    """Time all candidates round by round.

    One that is slow (SLOW_RUN_S, SLOW_RATIO) in its warm-up and again in its next run keeps that run as its
    only one. The garbage collector runs between rounds and is off inside them; it is spared what is there
    before the first one.
    """
    gc.collect()
    gc.freeze()
    try:
        return _time_in_turns(candidates, device, budget)
    finally:
        gc.unfreeze()


def _time_in_turns(
    candidates: Mapping[str, Prepare], device: torch.device, budget: Budget
) -> dict[str, Timing]:
    first = {name: _timed(prepare(0), device) for name, prepare in candidates.items()}
    again = {name: _timed(candidates[name](1), device) for name in _slow(first, first)}
    slow = _slow(again, first)
    taken = {name: [again[name]] if name in slow else [] for name in candidates}
    quick = [name for name in candidates if name not in slow]
    for number in range(1, budget.warmups):
        _round(candidates, quick, number, device)
    started, rounds = time.perf_counter(), 0
    while rounds < budget.min_rounds or (
        rounds < budget.max_rounds and time.perf_counter() - started < budget.seconds
    ):
        rounds += 1
        for name, seconds in _round(candidates, quick, budget.warmups + rounds, device).items():
            taken[name].append(seconds)
    return {name: Timing.of(seconds) for name, seconds in taken.items()}


def _slow(seconds: Mapping[str, float], among: Mapping[str, float]) -> list[str]:
    fastest = min(among.values(), default=0.0)
    return [name for name, s in seconds.items() if s > max(SLOW_RUN_S, SLOW_RATIO * fastest)]


def _round(
    candidates: Mapping[str, Prepare], names: list[str], number: int, device: torch.device
) -> dict[str, float]:
    first = number % len(names)
    gc.collect()
    gc.disable()
    try:
        return {name: _timed(candidates[name](number), device) for name in names[first:] + names[:first]}
    finally:
        gc.enable()


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run; on a GPU between two events on its stream."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that `work` holds at once, beyond what was there before; None where it cannot be measured.

    On a GPU from torch's allocator. On Linux the resident memory of this process: its high-water mark is set
    back, and what the heap keeps of earlier runs is returned first. Torch's own record of allocations would
    be more exact, but a backend may take large buffers elsewhere (ours does, for huge pages).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes("VmRSS")
    except (OSError, AttributeError):  # a sandbox that forbids it, or not glibc
        return None
    work()
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def gemm_flops_per_second(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """The rate of one plain matrix product that is large enough for this device: the roof over all layers."""
    n = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(2 * n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype))
    best = min(_timed(lambda: a @ b, device) for _ in range(1 + rounds))
    return 4 * n**3 / best


def bytes_per_second(device: torch.device, rounds: int = 3) -> float:
    """The rate of copying memory too large for caches; a byte read and a byte written count as two."""
    source = torch.ones(64 << 20, device=device)  # 256 MiB
    target = torch.empty_like(source)
    best = min(_timed(lambda: target.copy_(source), device) for _ in range(1 + rounds))
    return 2 * source.nbytes / best


def import_seconds(module: str, rounds: int = 5) -> float:
    """Median time of `import module` in fresh interpreters, without their own start."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(rounds)
    ]
    return statistics.median(map(float, runs))


def digits(number: float) -> str:
    """Three digits that count: 0.123, 1.23, 12.3, 123, 1234."""
    return f"{number:.{max(0, 2 - len(str(int(abs(number)))) + 1) if abs(number) >= 1 else 3}f}"
