"""Attention over a long cache: our Triton kernel beside F.scaled_dot_product_attention and FlexAttention.

    python -m benchmarks.gpu_attention                  a million and ten million keys; at most 6 minutes
    python -m benchmarks.gpu_attention --quick          a million keys, 64 channels
    python -m benchmarks.gpu_attention --tiles          also our kernel with other tiles than the chosen one
    python -m benchmarks.gpu_attention --show FILE      the tables of a finished or unfinished run

Answering: questions of one token that share one cache, two query heads each. Reading: 16,384 tokens of a
prompt after all those before them. Writes its JSON after every size and prints a Markdown table.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import driver
from benchmarks.gpu_attention_tables import OURS, render
from benchmarks.gpu_store import load, new_path, write, write_text
from benchmarks.gpu_timing import Budget, DeadDeviceError, Stopwatch, dense_flops_per_second
from benchmarks.measure import bytes_per_second
from benchmarks.record import FULL, environment, kind_of

NO_GPU = "benchmarks.gpu_attention measures kernels on a CUDA device, and torch sees none here."
MILLION, CHUNK = 1 << 20, 16_384
LAST_S = 3.0  # kept back for the table
CELL_S = 40.0  # what one size may take, most of it to compile FlexAttention

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Cell:
    """sequences with some queries each, over one cache of so many keys."""

    sequences: int
    queries: int
    keys: int
    channels: int

    def __str__(self) -> str:
        rows = f"{self.sequences * 2} rows"
        what = rows if self.queries == 1 else f"{self.queries:,} tokens of a prompt"
        return f"{what}, {self.keys:,} keys, {self.channels} channels"


# What tells most comes first; 2 query heads, so that 32 sequences are 64 rows.
CELLS = (
    Cell(32, 1, MILLION, 64),
    Cell(1, CHUNK, MILLION, 64),
    Cell(192, 1, MILLION, 64),
    Cell(32, 1, MILLION, 128),
    Cell(1, CHUNK, MILLION, 128),
    Cell(192, 1, MILLION, 128),
    Cell(32, 1, 10_000_000, 64),
    Cell(192, 1, 10_000_000, 64),
    Cell(32, 1, 10_000_000, 128),
    Cell(192, 1, 10_000_000, 128),
)
QUICK = CELLS[:3]
TINY = (Cell(3, 1, 300, 16), Cell(1, 20, 150, 16))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. 2 without a GPU; 1 where our own result is wrong or fails, and has no speed."""
    began = time.perf_counter()
    options = parse(argv)
    if options.show:
        print(render(load(options.show)))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    log: Log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    record, path = begin(device, options)
    try:
        for cell in TINY if options.tiny else QUICK if options.quick else CELLS:
            left = 60 * options.minutes - LAST_S - (time.perf_counter() - began)
            if reason := why_not(cell, left, device, options):
                record["left_out"][str(cell)] = reason
                continue
            log(f"{cell} ({left:.0f} s left)")
            from benchmarks.gpu_attention_cell import measure  # needs triton

            budget = Budget(options.seconds, warmups=3)
            dtype = getattr(torch, options.dtype)
            found = measure(cell, Stopwatch(device), dtype, budget, tiles=options.tiles)
            record["results"].append({"cell": asdict(cell), "size": str(cell)} | found)
            write(record, path)
    except DeadDeviceError as error:
        log(f"The GPU answers no more after {error}. What was measured before is in {path}.")
        record["left_out"]["the rest"] = f"the GPU stopped after {error}"
    write(record, path)
    write_text(path.with_suffix(".md"), render(record) + "\n")
    print(f"{render(record)}\n\nwritten: {path}")
    return int(any(OURS not in result["timings"] for result in record["results"]))


def begin(device: torch.device, options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """A new record with the machine's facts and its two measured rates, and where it will be kept."""
    facts: dict[str, Any] = environment(device) | {"driver": driver(device)}
    if options.commit:
        facts["commit"] = options.commit
    record: dict[str, Any] = {
        "benchmark": "gpu_attention",
        "mode": options.kind,
        "command": " ".join(["python -m benchmarks.gpu_attention", *options.words]),
        "environment": facts,
        "dtype": options.dtype,
        "rates": {
            "flops_per_second": dense_flops_per_second(Stopwatch(device), getattr(torch, options.dtype)),
            "bytes_per_second": bytes_per_second(device),
        },
        "results": [],
        "left_out": {},
    }
    name = "gpu_attention" if options.kind == FULL else f"gpu_attention_{options.kind}"
    return record, new_path(name, facts, options.results)


def why_not(cell: Cell, left_s: float, device: torch.device, options: argparse.Namespace) -> str | None:
    """Why a size is left out, or None."""
    if left_s < CELL_S and device.type == "cuda":
        return f"{max(0, left_s):.0f} s were left"
    if device.type == "cuda":
        item = getattr(torch, options.dtype).itemsize
        needed = 1.3 * 2 * item * cell.keys * cell.channels + (2 << 30)
        free, _ = torch.cuda.mem_get_info(device)
        if free < needed:
            return f"needs {needed / 2**30:.1f} GiB of free memory, and there are {free / 2**30:.1f}"
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="three sizes of a million keys")
    parser.add_argument("--tiles", action="store_true", help="also ours with other tiles")
    parser.add_argument("--minutes", type=float, help="for everything; default 6, or 2 with --quick")
    parser.add_argument("--seconds", type=float, default=1.0, help="of rounds for one size")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--results", type=Path, help="folder of the JSON file")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file, measure nothing")
    parser.add_argument("--commit", help="the commit measured, for a copy without its history")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: to try the benchmark
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    others = ("minutes", "commit", "show", "device", "tiles")
    selection = {name: value for name, value in vars(options).items() if name not in others}
    options.kind = kind_of(parser, argparse.Namespace(**selection), quick=options.quick)
    options.words = list(sys.argv[1:] if argv is None else argv)
    options.minutes = options.minutes or (2.0 if options.quick else 6.0)
    return options


if __name__ == "__main__":
    sys.exit(main())
