"""Find faster schedules for the passes of moe_triton on this GPU. Opt-in: nothing else ever tunes.

    python -m benchmarks.tune --shape qwen3_30b --tokens 8192
    python -m benchmarks.tune --shape olmoe,qwen3_30b --tokens 128,8192 --passes grad_pre,up --write user

Each pass is timed alone with every schedule of `tune_space`, then the best ones with their neighbours, then
the finalists in turns with today's schedule. A schedule must give today's result. Of several shapes the
winner has the least mean of its time over the best of each. --write user puts the winners into the user's own
table, which moe_triton reads first; --write package into the shipped one.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_cells import NAMED, memory_needed
from benchmarks.gpu_problem import Problem, make_problem
from benchmarks.gpu_timing import DeadDeviceError, Stopwatch, failure_of
from benchmarks.record import hardware, table
from benchmarks.roofline import datasheet_of, works
from moe.doctor import installed

if TYPE_CHECKING:  # without Triton this file must still say what is missing
    from benchmarks.tune_passes import Found
    from moe_triton.config import Config

NO_GPU = "benchmarks.tune times schedules on a CUDA device, and torch sees none here."
CONTEXT_BYTES = 1 << 30  # of GPU memory that a process takes before its first tensor, and its flushed buffer
NO_TRITON = "benchmarks.tune needs triton: pip install triton."


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, print, write. 2 without a GPU or Triton."""
    options = parse(argv)
    obstacle = why_not(options.device) or why_no_row(options)
    if obstacle:
        print(obstacle, file=sys.stderr)
        return 2
    deadline = time.perf_counter() + 60 * options.minutes
    device = torch.device(options.device)
    watch = Stopwatch(device)
    if options.part:
        return compile_share(options, watch)
    jobs = processes(options, device)
    if jobs > 1:
        compile_ahead(options, jobs, limit_s=0.5 * 60 * options.minutes)
    lines, rows = tune(options, watch, deadline)
    head = ["shape", "tokens", "pass", "today ms", "best ms", "gain", "% of datasheet", "tried", "schedule"]
    print(f"{hardware(device)}, {options.dtype}\n\n{table(head, lines)}")
    if options.write and rows:
        write(options.write, device, rows)
    return 0


def tune(
    options: argparse.Namespace, watch: Stopwatch, deadline: float
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Lines of the table to print and rows to keep, one for each size and pass; equal time for each."""
    from benchmarks.tune_passes import tune_pass

    todo = list(product(options.tokens, options.shape, options.passes))
    lines: list[list[str]] = []
    found: dict[tuple[int, str], list[Found]] = {}
    for number, (tokens, name, what) in enumerate(todo):
        until = time.perf_counter() + (deadline - time.perf_counter()) / (len(todo) - number)
        problem = problem_of(options, name, tokens, watch.device)
        try:
            one = tune_pass(what, name, problem, watch, until)
        except DeadDeviceError as error:
            print(f"The GPU answers no more after {error}. Kept: what was found before.", file=sys.stderr)
            break
        if one is None:
            print(f"{name} t={tokens} {what}: no schedule could be timed", file=sys.stderr)
            continue
        lines.append(line_of(one, problem, hardware(watch.device)))
        found.setdefault((tokens, what), []).append(one)
        print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    return lines, [row_of(several, options, watch.device) for several in found.values()]


def why_not(device: str) -> str | None:
    """What is missing for tuning, or None."""
    if installed("triton") is None:
        return NO_TRITON
    return NO_GPU if device == "cuda" and not torch.cuda.is_available() else None


def why_no_row(options: argparse.Namespace) -> str | None:
    """Why the winners could not be written as rows of a table, or None."""
    from benchmarks.tune_space import size_of

    classes = {name: size_of(NAMED[name].d, NAMED[name].h) for name in options.shape}
    if options.write and len(set(classes.values())) > 1:
        listed = ", ".join(f"{name} is {size}" for name, size in classes.items())
        return f"A row is for experts of one size class: {listed}. Tune them one after the other."
    return None


def problem_of(options: argparse.Namespace, name: str, tokens: int, device: torch.device) -> Problem:
    """Tokens, weights and routing of one size."""
    shape, dtype = NAMED[name], getattr(torch, options.dtype)
    return make_problem(shape, tokens, zipf=False, device=device, dtype=dtype)


def compile_share(options: argparse.Namespace, watch: Stopwatch) -> int:
    """In a process of its own: run every n-th schedule once, so that Triton keeps what it has compiled."""
    from benchmarks.tune_passes import candidates, run_forced, steps_of

    part, parts = options.part
    for tokens, name in product(options.tokens, options.shape):
        problem = problem_of(options, name, tokens, watch.device)
        steps = steps_of(problem)
        for what in options.passes:
            for config in candidates(what, problem)[part::parts]:
                failure_of(lambda w=what, c=config, s=steps: run_forced(w, c, s[w]), watch, str(config))
    return 0


def processes(options: argparse.Namespace, device: torch.device) -> int:
    """As many as were asked for and as have room for their tensors on the GPU."""
    if device.type != "cuda":
        return 1
    sizes = product(options.shape, options.tokens)
    needed = max(memory_needed(NAMED[name], t, backward=True) for name, t in sizes)
    free, _ = torch.cuda.mem_get_info(device)
    return min(options.jobs, int(0.8 * free / (1.5 * needed + CONTEXT_BYTES)))


def compile_ahead(options: argparse.Namespace, jobs: int, limit_s: float) -> None:
    """Let many processes compile, since Triton compiles one kernel at a time; late ones are ended."""
    command = [sys.executable, "-m", "benchmarks.tune", *options.words]
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([*command, "--part", f"{i}/{jobs}"], env=environment, stdout=subprocess.DEVNULL)
        for i in range(jobs)
    ]
    try:
        for child in children:
            child.wait(timeout=max(0.1, limit_s - (time.perf_counter() - began)))
    except subprocess.TimeoutExpired:
        print("compiling ahead took too long and was cut off", file=sys.stderr)
    finally:
        for child in children:
            child.kill()
            child.wait()


def row_of(found: Sequence["Found"], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The winner of one pass over all shapes as a table row, with where and how it was measured."""
    from benchmarks.tune_space import fastest_for_all, winner_row

    best = found[0].best if len(found) == 1 else fastest_for_all([one.ms for one in found])
    measured = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python -m benchmarks.tune", *options.words]),
        "device": hardware(device),
        "ms": {one.shape: round(one.ms[best], 4) for one in found},
        "torch": torch.__version__,
        "triton": installed("triton"),
    }
    shape, rows = NAMED[found[0].shape], max(one.rows_per_expert for one in found)
    return winner_row(found[0].what, rows, shape.d, shape.h, best, measured)


def write(where: str, device: torch.device, rows: list[dict[str, Any]]) -> None:
    """Put rows into the user's table or the package's."""
    from benchmarks.tune_space import write_rows
    from moe_triton.config import TABLES, user_table
    from moe_triton.launch import target_of

    target = target_of(device)
    shipped, own = TABLES / f"{target.name}.json", user_table(target)
    path = own if where == "user" else shipped
    write_rows(path, rows)
    print(f"\nwritten: {path}")


def line_of(found: "Found", problem: Problem, device_name: str) -> list[str]:
    """A line of the printed table."""
    today = found.today_ms
    item = problem.x.element_size()
    work = works(problem.shape, found.tokens, item=item, active=problem.active)[found.what]
    sheet = datasheet_of(device_name)
    floor = sheet and work.floor_s(sheet.flops, sheet.bytes_per_second)
    return [
        found.shape,
        str(found.tokens),
        found.what,
        str(today) if today else "-",
        str(found.best_ms),
        f"{today.ms / found.best_ms.ms:.2f}" if today else "-",
        f"{1e3 * floor / found.best_ms.ms:.0%}" if floor else "-",
        f"{len(found.ms)} + {len(found.failed)} failed",
        in_words(found.best) + ("" if found.best != found.today else " (today's)"),
    ]


def in_words(config: "Config") -> str:
    """A schedule in one word each: 128x128x64 w8 s3 g8, and what is on."""
    flags = [f.name for f in fields(config) if getattr(config, f.name) is True]
    splits = [f"splits {config.splits}"] if config.splits > 1 else []
    tile = f"{config.rows}x{config.outs}x{config.ins}"
    return " ".join(
        [tile, f"w{config.num_warps}", f"s{config.num_stages}", f"g{config.group}", *flags, *splits]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    passes = ("up", "down", "grad_pre", "grad_down", "grad_rows", "grad_up")
    parser.add_argument("--shape", type=_names, default=("qwen3_30b",), help="such as qwen3_30b,olmoe")
    parser.add_argument("--tokens", type=_numbers, default=(8192,), help="such as 128,8192")
    parser.add_argument("--passes", type=_names, default=passes, help=f"of {','.join(passes)}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all passes together")
    parser.add_argument("--write", choices=("user", "package"), help="keep the winners in this table")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2),
                        help="processes that compile ahead")  # fmt: skip
    parser.add_argument("--part", type=_part, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.words = list(sys.argv[1:] if argv is None else argv)
    unknown = [name for name in options.passes if name not in passes]
    if unknown:
        parser.error(f"unknown passes {', '.join(unknown)}: choose from {', '.join(passes)}")
    if missing := [name for name in options.shape if name not in NAMED]:
        parser.error(f"unknown shapes {', '.join(missing)}: choose from {', '.join(NAMED)}")
    if options.write and options.dtype == "float32":
        parser.error("--write needs a 16-bit --dtype: tables are not read for float32")
    return options


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _part(text: str) -> tuple[int, int]:
    part, parts = text.split("/")
    return int(part), int(parts)


if __name__ == "__main__":
    sys.exit(main())
