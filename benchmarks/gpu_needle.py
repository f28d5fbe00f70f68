"""Needles in 1 and 10 million tokens, and exact attention of all pairs of them, on one GPU.

    python -m benchmarks.gpu_needle                     trains, asks, times: at most 9 minutes
    python -m benchmarks.gpu_needle --run runs/needle   asks a run that was trained before
    python -m benchmarks.gpu_needle --parts recall-1M,strict-1M
    python -m benchmarks.gpu_needle --show FILE         the tables of a finished or unfinished run

Parts, each only while there is time:

    recall-1M, recall-10M    reading with the early exit, every question alone, both templates
    strict-1M, strict-10M    LLGL, the full layer in the middle: every pair of places, random weights
    strict-recall-1M         the trained run at every place of every layer, and what it finds

What is left out or cut short is listed with its reason. Writes its JSON after every haystack, prints Markdown
tables and the goals, and keeps those beside the JSON.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_needle_tables
from benchmarks.gpu import driver
from benchmarks.gpu_needle_parts import (
    Clock,
    Job,
    OutOfTimeError,
    ask_about,
    read_strictly,
    recall_strictly,
)
from benchmarks.gpu_needle_tables import RECALL_GOALS, STRICT_GOALS, STRICT_LEAST, STRICT_RECALL
from benchmarks.gpu_needle_train import train_needle
from benchmarks.gpu_store import load, new_path, write, write_text
from benchmarks.gpu_timing import FAILURES, Stopwatch, dense_flops_per_second
from benchmarks.long_context_model import DTYPES
from benchmarks.measure import bytes_per_second
from benchmarks.record import FULL, PARTIAL, environment
from moe.parameters import count_parameters
from moe.train.overrides import change, find_preset
from moe.train.runs import Run, open_run

NO_GPU = "benchmarks.gpu_needle reads millions of tokens on a CUDA device, and torch sees none here."
PARTS = ("recall-1M", "strict-1M", STRICT_RECALL, "recall-10M", "strict-10M")
LAST_S = 3.0  # kept back for the tables

Log = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, ask, time, print, write. 2 without a GPU; 0 also when a goal is missed: the table says so."""
    began = time.perf_counter()
    options = parse(argv)
    if options.show:
        print(gpu_needle_tables.render(load(options.show)))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    log: Log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    clock = Clock(began + 60 * options.minutes - LAST_S)
    record, path = begin(device, options)
    with tempfile.TemporaryDirectory(prefix="needle-") as scratch:
        if options.run:
            run = open_run(options.run, device=str(device))
        else:
            run = train_here(record, options.out or Path(scratch) / "needle", device, clock, options, log)
        record["model"] = {} if run is None else facts_of(run, trained_here=options.run is None)
        job = Job(device, run, clock, options.folder, options.dtype, options.strict_dtype)
        for part in options.parts:
            attempt(part, job, record, path, options, log)
    finish(record, path)
    return 0


def begin(device: torch.device, options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """A new record with the machine's facts and its two measured rates, and where it will be kept."""
    facts: dict[str, Any] = environment(device) | {"driver": driver(device)}
    if options.commit:
        facts["commit"] = options.commit
    dtype = DTYPES[options.strict_dtype]
    record = {
        "benchmark": "gpu_needle",
        "mode": options.kind,
        "command": " ".join(["python -m benchmarks.gpu_needle", *options.words]),
        "environment": facts,
        "rates": {
            "flops_per_second": dense_flops_per_second(Stopwatch(device), dtype),
            "bytes_per_second": bytes_per_second(device),
        },
        "dtypes": {"recall": options.dtype, "strict": options.strict_dtype},
        "model": {},
        "training": None,
        "recall": {},
        "strict": {},
        "left_out": {},
    }
    name = "gpu_needle" if options.kind == FULL else f"gpu_needle_{options.kind}"
    return record, new_path(name, facts, options.results)


def train_here(
    record: dict[str, Any],
    folder: Path,
    device: torch.device,
    clock: Clock,
    options: argparse.Namespace,
    log: Log,
) -> Run | None:
    """The preset `needle`, trained within its share of the minutes; None where that failed, and why."""
    seconds = min(60 * options.train_minutes, clock.left_s)
    try:
        record["training"] = train_needle(folder, device, seconds, options.set, log)
    except FAILURES as error:
        record["left_out"]["training"] = in_a_line(error)
        log(f"training: {in_a_line(error)}")
        return None
    return open_run(folder, device=str(device))


def in_a_line(error: BaseException) -> str:
    """An error in words."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def facts_of(run: Run, *, trained_here: bool) -> dict[str, Any]:
    """Who is asked."""
    count = count_parameters(run.config.model)
    return {
        "run": "trained here" if trained_here else run.folder.name,
        "step": run.step,
        "total": count.total,
        "active": count.active,
        "trained_length": run.config.data.sequence_length,
    }


def attempt(
    part: str, job: Job, record: dict[str, Any], path: Path, options: argparse.Namespace, log: Log
) -> None:
    """One part; what stops it is written down, and the others go on."""
    log(f"{part} ({job.clock.left_s:.0f} s left)")
    reason = None
    try:
        if part in RECALL_GOALS:
            measure_recall(part, job, record, path, options, log)
        else:
            record["strict"][part] = measure_strict(part, job, record, options)
    except OutOfTimeError as error:
        reason = str(error)
    except FAILURES as error:
        reason = in_a_line(error)
    if reason is not None:
        record["left_out"][part] = reason
        log(f"{part}: {reason}")
    write(record, path)


def measure_recall(
    part: str, job: Job, record: dict[str, Any], path: Path, options: argparse.Namespace, log: Log
) -> None:
    """Haystack after haystack into the record."""
    tokens, _, queries, haystacks = RECALL_GOALS[part]
    tokens = shortened(tokens, options)
    found = record["recall"][part] = {"length": tokens, "haystacks": []}
    for result in ask_about(job, tokens, options.queries or queries, options.haystacks or haystacks):
        found["haystacks"].append(result)
        right = sum(is_right for _, _, is_right in result["answers"])
        log(f"{part}: {right}/{len(result['answers'])} right, {result['seconds']:.1f} s")
        write(record, path)


def measure_strict(
    part: str, job: Job, record: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Every pair of places: for the time, or with questions."""
    if part == STRICT_RECALL:
        tokens = shortened(RECALL_GOALS["recall-1M"][0], options)
        return recall_strictly(job, tokens, options.queries or STRICT_LEAST)
    tokens = shortened(STRICT_GOALS[part][0], options)
    return read_strictly(job, tokens, record["strict"].get("strict-1M"))


def shortened(tokens: int, options: argparse.Namespace) -> int:
    """A part's length; to try everything, a fraction of it."""
    return max(1, tokens // options.shorten)


def finish(record: dict[str, Any], path: Path) -> None:
    """Judge, print, write."""
    record["goals"] = gpu_needle_tables.judge(record)
    write(record, path)
    tables = gpu_needle_tables.render(record)
    write_text(path.with_suffix(".md"), tables + "\n")
    print(f"{tables}\n\nwritten: {path}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_needle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, help="a trained run; default: train one here")
    parser.add_argument("--out", type=Path, help="keep the run that is trained here in this folder")
    parser.add_argument("--set", action="append", default=[], metavar="part.key=value",
                        help="of the run that is trained here")  # fmt: skip
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--train-minutes", type=float, default=2.0, help="of those, at most, for training")
    parser.add_argument("--folder", type=Path, help="text around the needles; default: installed packages")
    parser.add_argument("--queries", type=int, help="of each template and length")
    parser.add_argument("--haystacks", type=int, help="of each length")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the cache, for recall")
    parser.add_argument("--strict-dtype", choices=DTYPES, default="bfloat16",
                        help="of the cache, for all pairs: matrix units have no float32")  # fmt: skip
    parser.add_argument("--results", type=Path, help="folder of the JSON file")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file, measure nothing")
    parser.add_argument("--commit", help="the commit measured, for a copy without its history")
    parser.add_argument("--shorten", type=int, default=1, help=argparse.SUPPRESS)  # to try the benchmark:
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # shorter texts, on a cpu
    options = parser.parse_args(argv)
    options.words = list(sys.argv[1:] if argv is None else argv)
    selecting = ("parts", "queries", "haystacks", "dtype", "strict_dtype", "shorten")
    is_whole = all(getattr(options, name) == parser.get_default(name) for name in selecting)
    options.kind = FULL if is_whole else PARTIAL
    try:
        change(find_preset("needle"), None, options.set)
    except ValueError as error:
        parser.error(str(error))
    return options


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}.")
    return names


if __name__ == "__main__":
    sys.exit(main())
