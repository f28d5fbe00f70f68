"""Our Triton kernels against everything else that runs here, and against what the GPU could do.

    python -m benchmarks.gpu                        the most telling sizes first, for 6 minutes
    python -m benchmarks.gpu --quick                five cells, 2 minutes
    python -m benchmarks.gpu --shapes olmoe --tokens 128,8192 --minutes 9
    python -m benchmarks.gpu --resume FILE          go on where a run was cut off
    python -m benchmarks.gpu --show FILE            the tables of a finished or unfinished run

Writes its JSON after every cell, prints Markdown tables and the goals, and keeps those beside the JSON.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_goals, gpu_tables
from benchmarks.gpu_cell import Bench, measure, release
from benchmarks.gpu_cells import NAMED, Cell, chosen_cells, key, seconds_needed
from benchmarks.gpu_compile import jobs, run_all
from benchmarks.gpu_store import load, new_path, write
from benchmarks.gpu_timing import Budget, DeadDeviceError, Stopwatch, dense_flops_per_second
from benchmarks.measure import bytes_per_second
from benchmarks.record import FULL, environment, kind_of
from benchmarks.roofline import datasheet_of
from moe.doctor import installed

NO_GPU = "benchmarks.gpu measures kernels on a CUDA device, and torch sees none here."
COMPILE_SHARE, COMPILE_S = 0.25, 90.0  # of the minutes, and at most so many seconds, to compile ahead
PEERS = ("liger-kernel", "moe-ops")
LAST_S = 3.0  # kept back for the tables

Log = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. 2 without a GPU; 0 also when a goal is missed: the table says so."""
    began = time.perf_counter()
    options = parse(argv)
    if options.show:
        print(gpu_tables.render(load(options.show)))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    log: Log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    deadline = began + 60 * options.minutes - LAST_S
    record, path = (load(options.resume), options.resume) if options.resume else begin(device, options)
    cells = [cell for cell in chosen_cells(options.shapes, options.tokens, quick=options.quick)
             if not any(result["cell"] == key(cell) for result in record["results"])]  # fmt: skip
    bench = bench_of(device, record, deadline, options)
    if device.type == "cuda" and options.jobs:
        record["compiled"] = sorted(compile_ahead(cells, options, log))
    bench.compiled |= {(name, shape) for name, shape in record["compiled"]}
    try:
        measure_cells(cells, record, path, bench, log)
    except DeadDeviceError as error:
        return start_again(error, record, path, deadline, options.words)
    finish(record, path)
    return 0


def begin(device: torch.device, options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """A new record with the machine's facts and its two measured rates, and where it will be kept."""
    dtype = getattr(torch, options.dtype)
    facts: dict[str, Any] = environment(device) | {"driver": driver(device)}
    facts["versions"] = facts["versions"] | {name: installed(name) for name in PEERS}
    if options.commit:
        facts["commit"] = options.commit
    sheet = datasheet_of(str(facts["hardware"]))
    record = {
        "benchmark": "gpu",
        "mode": options.kind,
        "command": " ".join(["python -m benchmarks.gpu", *options.words]),
        "environment": facts,
        "dtype": options.dtype,
        "rates": {
            "flops_per_second": dense_flops_per_second(Stopwatch(device), dtype),
            "bytes_per_second": bytes_per_second(device),
        },
        "datasheet": sheet
        and {
            "name": sheet.name,
            "source": sheet.source,
            "flops_per_second": sheet.flops,
            "bytes_per_second": sheet.bytes_per_second,
        },
        "results": [],
        "left_out": {},
        "compiled": [],
        "dead": [],
    }
    name = "gpu" if options.kind == FULL else f"gpu_{options.kind}"
    return record, new_path(name, facts, options.results)


def driver(device: torch.device) -> str | None:
    """The version of the GPU's driver, where nvidia-smi tells it."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.strip().splitlines()[0] if answer.strip() else None


def bench_of(
    device: torch.device, record: dict[str, Any], deadline: float, options: argparse.Namespace
) -> Bench:
    """What the cells share; who stopped the GPU in a cell stays out of it."""
    banned = {(name, cell): f"stopped the GPU: {reason}" for name, cell, reason in record["dead"]}
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 33
    least = 5 if device.type == "cuda" else 1
    budget = Budget(seconds=options.seconds, warmups=options.warmups, min_rounds=least)
    dtype = getattr(torch, record["dtype"])
    return Bench(Stopwatch(device), dtype, float(total), budget, deadline, banned=banned)


def compile_ahead(cells: list[Cell], options: argparse.Namespace, log: Log) -> set[tuple[str, str]]:
    """Compile what the cells need in many processes, for a part of the time; (name, shape) of what was."""
    work = jobs(cells)
    limit = min(COMPILE_S, COMPILE_SHARE * 60 * options.minutes)
    log(f"compiling ahead: {len(work)} processes, {options.jobs} at once, at most {limit:.0f} s")
    began = time.perf_counter()
    missing = {(name, shape) for shape, _, name, _, _ in run_all(work, at_once=options.jobs, limit_s=limit)}
    log(f"compiled ahead for {time.perf_counter() - began:.0f} s; cut off: {sorted(missing) or 'nothing'}")
    return {(name, shape) for shape, _, name, _, _ in work} - missing


def measure_cells(cells: list[Cell], record: dict[str, Any], path: Path, bench: Bench, log: Log) -> None:
    """One after the other while there is time; the record is written after each."""
    rates = record["rates"]["flops_per_second"], record["rates"]["bytes_per_second"]
    record["left_out"] = {}
    gc.collect()
    gc.freeze()  # what has been imported need not be searched again between the cells
    for cell in cells:
        needed = seconds_needed(cell, *rates, bench.budget.seconds)
        if needed > bench.left_s:
            left = max(0.0, bench.left_s)
            record["left_out"][str(cell)] = f"takes about {needed:.0f} s, {left:.0f} s were left"
            continue
        log(f"{cell} ({bench.left_s:.0f} s left)")
        try:
            record["results"].append(measure(cell, bench))
        except DeadDeviceError as error:
            record["dead"].append([error.candidate, str(cell), error.reason])
            raise
        finally:
            write(record, path)
        release(bench)


def start_again(
    error: DeadDeviceError, record: dict[str, Any], path: Path, deadline: float, words: list[str]
) -> int:
    """Go on in a fresh process without the candidate that stopped the GPU, while that helps."""
    minutes = (deadline - time.perf_counter()) / 60
    stopped = [(name, cell) for name, cell, _ in record["dead"]]
    if minutes < 0.3 or len(stopped) > 5 or len(set(stopped)) < len(stopped):
        print(
            f"The GPU answers no more after {error}. The measurements before are in {path}.", file=sys.stderr
        )
        finish(record, path)
        return 1
    print(f"The GPU answers no more after {error}: going on without it", file=sys.stderr, flush=True)
    words = [*words, "--resume", str(path), "--minutes", f"{minutes:.2f}", "--jobs", "0"]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *words])


def finish(record: dict[str, Any], path: Path) -> None:
    """Judge, print, write."""
    record["goals"] = gpu_goals.judge(record)
    write(record, path)
    tables = gpu_tables.render(record)
    path.with_suffix(".md").write_text(tables + "\n", encoding="utf-8")
    print(f"{tables}\n\nwritten: {path}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="five cells, 2 minutes")
    parser.add_argument("--shapes", type=_names, help=f"such as qwen3_30b,olmoe; of {', '.join(NAMED)}")
    parser.add_argument("--tokens", type=_numbers, help="such as 128,8192")
    parser.add_argument("--minutes", type=float, help="for everything; default 6, or 2 with --quick")
    parser.add_argument("--seconds", type=float, default=0.6, help="of rounds for one mode of one cell")
    parser.add_argument("--warmups", type=int, default=10, help="runs before the first that counts")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2),
                        help="processes that compile ahead; 0 for none")  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--results", type=Path, help="folder of the JSON file")
    parser.add_argument("--resume", type=Path, help="the JSON file of a run that was cut off")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file, measure nothing")
    parser.add_argument("--commit", help="the commit measured, for a copy without its history")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: to try the benchmark
    options = parser.parse_args(argv)
    options.words = list(sys.argv[1:] if argv is None else argv)
    options.kind = kind_of(parser, _selection(options), quick=options.quick)
    options.minutes = options.minutes or (2.0 if options.quick else 6.0)
    unknown = [name for name in options.shapes or () if name not in NAMED]
    if unknown:
        parser.error(f"unknown shapes {', '.join(unknown)}: choose from {', '.join(NAMED)}")
    return options


def _selection(options: argparse.Namespace) -> argparse.Namespace:
    """The options that select what is measured: where it is kept or how it is compiled does not."""
    others = ("words", "jobs", "minutes", "commit", "resume", "show")
    return argparse.Namespace(**{name: value for name, value in vars(options).items() if name not in others})


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
