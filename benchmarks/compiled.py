"""What the kernels become, with no GPU there: compiled for each target, read, and held to what is promised.

    python -m benchmarks.compiled                                  every row of the tables, all targets
    python -m benchmarks.compiled --target sm_90 --shapes mixtral --json compiled.json

Registers, shared memory, how many programs a multiprocessor holds; how matrices are multiplied and operands
loaded; the main loop. Exits with 1 when something is spilled, or multiplied by the wrong instructions.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import triton

from benchmarks.compiled_report import Report, complaints, examine
from benchmarks.launch_cases import collect
from benchmarks.launches import TARGETS
from benchmarks.record import table
from moe_triton.launch import INTERPRETED, Target

HEAD = (
    "call",
    "kernel",
    "configuration",
    "registers",
    "shared KiB",
    "programs/SM",
    "matrix unit",
    "loop",
    "loads",
)


def render(reports: Iterable[Report]) -> str:
    """One Markdown table; loop: instructions of the main one, and the share that multiplies matrices."""
    return table(HEAD, map(_row, reports))


def _row(report: Report) -> Sequence[str]:
    loop = report.loop
    return (
        report.what,
        report.kernel,
        report.configuration,
        str(report.resources.registers),
        f"{report.shared / 1024:.0f}",
        str(report.resident),
        ", ".join(report.matrix) or "-",
        f"{loop.instructions} / {loop.matrix_share:.0%}" if loop else "-",
        ", ".join(report.loads) or "-",
    )


def as_data(report: Report, target: Target) -> dict[str, Any]:
    """A report as plain data."""
    return {"target": target.name, **asdict(report), "complaints": complaints(report, target)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each target, and what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all; may be repeated")
    parser.add_argument("--shapes", type=lambda text: text.split(","), help="names from benchmarks.shapes")
    parser.add_argument("--json", type=Path, help="also write everything that was found to this file")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled. Unset it.")
    data: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for target in (TARGETS[name] for name in options.target or TARGETS):
            launches = [one for found in collect(target, options.shapes).values() for one in found]
            reports = list(pool.map(partial(examine, target=target), launches))
            print(f"\n{target.name}, triton {triton.__version__}\n\n{render(reports)}")
            data += [as_data(report, target) for report in reports]
    if options.json:
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    wrong = [one for one in data if one["complaints"]]
    for one in wrong:
        print("{target}: {what}: {kernel} {configuration}:".format(**one), "; ".join(one["complaints"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
