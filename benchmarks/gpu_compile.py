"""Compile ahead: one process a candidate and size, on as many cores as there are, before anything is timed.

Triton and Inductor keep what they have compiled on the disk; the process that measures finds it there. A
candidate that tries many schedules compiles a share of them in each of several processes.

    python -m benchmarks.gpu_compile SHAPE TOKENS CANDIDATE PART PARTS      one process' share
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import import_module

import torch

from benchmarks.gpu_candidates import COMPILED, LIGER, MOE_OPS, OURS_SORTED, TUNED_MODULES, make, why_absent
from benchmarks.gpu_cells import FEW_TOKENS, NAMED, Cell, participants
from benchmarks.gpu_problem import make_problem
from benchmarks.gpu_timing import Stopwatch, failure_of
from benchmarks.shapes import Shape

PARTS = {LIGER: 8, MOE_OPS: 3}  # processes over which a candidate's schedules are spread
TUNED_SHAPES = 2  # only the first shapes: in six minutes there is no time to try the schedules of more
LARGEST_BYTES = 3e9  # of weights in one of many processes on one GPU
FEWEST_EXPERTS = 16  # a size is shrunk together with its experts, so that an expert's rows stay the same

Job = tuple[str, int, str, int, int]  # shape, tokens, candidate, part, parts


def jobs(cells: Iterable[Cell]) -> list[Job]:
    """The shares of everything that will be timed: the longest work first, then what tells most."""
    cells = [cell for cell in cells if cell.kind == "layer" and not cell.zipf]
    shapes = list(dict.fromkeys(cell.shape for cell in cells if not cell.is_sonic))
    tuned = [
        [(shape, 1024, name, i, parts) for name, parts in PARTS.items() for i in range(parts)]
        for shape in shapes[:TUNED_SHAPES]
        if any(cell.shape == shape and LIGER in participants(cell) for cell in cells)
    ]
    ours: dict[tuple[object, ...], Job] = {}
    for cell in cells:
        ours.setdefault(_kind(cell), (cell.shape, cell.tokens, OURS_SORTED, 0, 1))
    compiled = [(c.shape, c.tokens, COMPILED, 0, 1) for c in cells if COMPILED in participants(c)]
    found = [
        *(tuned[0] if tuned else []),
        *ours.values(),
        *compiled,
        *(j for g in tuned[1:] for j in g),
    ]
    return [job for job in found if why_absent(job[2], NAMED[job[0]]) is None and _sizes(job) is not None]


def _kind(cell: Cell) -> tuple[object, ...]:
    """What decides which kernels of ours are compiled: cells of one kind share them all."""
    shape = NAMED[cell.shape]
    rows = max(1, cell.tokens * shape.k // shape.e)
    height = min(1024, 1 << (rows - 1).bit_length())
    few = cell.tokens * shape.k <= 1024 and shape.e
    return shape.k, height, shape.d * shape.h >= 1 << 22, shape.d % 128, shape.h % 128, shape.gpt_oss, few


def _sizes(job: Job) -> tuple[Shape, int] | None:
    """Fewer experts and tokens that compile the same kernels; None if even so the weights are too large."""
    shape, tokens = NAMED[job[0]], job[1]
    factor = shape.e // min(FEWEST_EXPERTS, shape.e // 2)
    if job[2] != COMPILED and tokens // factor > FEW_TOKENS:
        shape, tokens = shape.with_experts(shape.e // factor), tokens // factor
    return (shape, tokens) if 2 * shape.e * shape.expert_numbers <= LARGEST_BYTES else None


def run_all(work: list[Job], *, at_once: int, limit_s: float) -> list[Job]:
    """Run the shares in processes of their own until all are done or the time is up; those not done."""
    started, waiting = time.perf_counter(), list(work)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        while (waiting or running) and time.perf_counter() - started < limit_s:
            running = {job: process for job, process in running.items() if process.poll() is None}
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                command = [sys.executable, "-m", "benchmarks.gpu_compile", *map(str, job)]
                running[job] = subprocess.Popen(
                    command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return [*running, *waiting]


def run_one(job: Job, device: torch.device) -> str | None:
    """Run one candidate forth and back once, with every parts-th schedule; why it failed, or None."""
    _, _, name, part, parts = job
    watch, sizes = Stopwatch(device), _sizes(job)
    if sizes is None:
        return "too large"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problem = make_problem(*sizes, zipf=False, device=device, dtype=dtype)

    def step() -> None:
        keep_share(name, part, parts)
        candidate = make(name, sizes[0])
        with torch.no_grad():
            candidate.run(problem)
        torch.autograd.grad(candidate.run(problem), list(problem.leaves.values()), problem.upstream)

    return failure_of(step, watch, name)


def keep_share(name: str, part: int, parts: int) -> None:
    """Of each autotuned kernel of a package, leave every parts-th schedule."""
    for module in TUNED_MODULES.get(name, ()):
        for kernel in vars(import_module(module)).values():
            configs = getattr(kernel, "configs", None)
            if isinstance(configs, list) and configs:
                kernel.configs = configs[part::parts] or configs[:1]


if __name__ == "__main__":
    shape_name, tokens, name, part, parts = sys.argv[1:]
    sys.exit(run_one((shape_name, int(tokens), name, int(part), int(parts)), torch.device("cuda")))
