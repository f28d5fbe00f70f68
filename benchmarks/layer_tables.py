"""The tables of benchmarks.layer, made from its JSON."""

from typing import Any

from benchmarks.candidates import DENSE, HF_GROUPED, OURS
from benchmarks.goals import describe, ratio
from benchmarks.measure import Timing, digits
from benchmarks.record import headline, table
from moe import doctor

ABSENT = "-"


def render(record: dict[str, Any]) -> str:
    """Everything as Markdown: one table for each mode and load, peak memory, skipped candidates, goals."""
    results = record["results"]
    kinds = sorted({(r["cell"]["backward"], r["cell"]["zipf"]) for r in results})
    settings = record["settings"]
    parts = [
        f"{headline(record['environment'])}\n\n"
        f"d={settings['d']} h={settings['h']} k={settings['k']} {settings['dtype']}; "
        f"milliseconds: median (p20-p80), candidates timed in turns; "
        f"plain matrix product {record['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"memory {record['bytes_per_second'] / 1e9:.1f} GB/s"
    ]
    parts += [_times(record, backward, zipf) for backward, zipf in kinds]
    parts += [_memory(results), _skipped(results), goals_table(record)]
    return "\n\n".join(part for part in parts if part)


def _times(record: dict[str, Any], backward: bool, zipf: bool) -> str:
    cells = [r for r in record["results"] if (r["cell"]["backward"], r["cell"]["zipf"]) == (backward, zipf)]
    names = _names(cells)
    head = ["tokens", "experts", *names, "ours / dense", "hf grouped_mm / ours", "ours: % of GEMM", "MaxVio"]
    rows = [_row(result, names, record["gemm_flops_per_second"]) for result in cells]
    mode = "Forward + backward" if backward else "Forward"
    return f"**{mode}, {'Zipf-skewed' if zipf else 'balanced'} routing**\n\n{table(head, rows)}"


def _row(result: dict[str, Any], names: list[str], gemm: float) -> list[str]:
    cell, timings = result["cell"], result["timings"]
    shown = {
        name: str(Timing(**timing)) + ("*" if timing["runs"] == 1 else "") for name, timing in timings.items()
    }
    rate = result["flops"] / timings[OURS]["ms"] * 1e3 / gemm
    return [
        str(cell["tokens"]),
        str(cell["experts"]),
        *(shown.get(name, ABSENT) for name in names),
        _times_of(ratio(result, OURS, DENSE)),
        _times_of(ratio(result, HF_GROUPED, OURS)),
        f"{rate:.0%}",
        f"{result['max_violation']:.1f}",
    ]


def _memory(results: list[dict[str, Any]]) -> str:
    measured = [r for r in results if r["peak_bytes"]]
    if not measured:
        return ""
    names = _names(measured, key="peak_bytes")
    rows = [
        [describe(r["cell"]), *(_mebibytes(r["peak_bytes"].get(name)) for name in names)] for r in measured
    ]
    return "**Peak memory of a run, MiB** (gradients included, weights not)\n\n" + table(["", *names], rows)


def _skipped(results: list[dict[str, Any]]) -> str:
    lines = [
        f"- {name}: {describe(r['cell'])}: {reason}" for r in results for name, reason in r["skipped"].items()
    ]
    once = "\\* one run after one warm-up: far slower than the others." if _has_single_runs(results) else ""
    return "\n".join(
        [*([once, ""] if once else []), *(["Not run (-):", "", *lines] if lines else [])]
    ).strip()


def goals_table(record: dict[str, Any]) -> str:
    """Each goal with what was measured and whether it is met; nothing where there are none."""
    if not record["goals"]:
        return ""
    words = {True: "met", False: "**NOT met**", None: "not measured"}
    rows = [(goal["goal"], _measured(goal), words[goal["met"]]) for goal in record["goals"]]
    return "\n".join(["**Goals**", "", *doctor.table(("goal", "measured", ""), rows)])


def _measured(goal: dict[str, Any]) -> str:
    return ABSENT if goal["measured"] is None else f"{goal['measured']:.2f}{goal['note']}"


def _names(results: list[dict[str, Any]], key: str = "timings") -> list[str]:
    """Candidates in the order in which they first appear."""
    return list(dict.fromkeys(name for result in results for name in result[key]))


def _has_single_runs(results: list[dict[str, Any]]) -> bool:
    return any(timing["runs"] == 1 for result in results for timing in result["timings"].values())


def _times_of(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _mebibytes(size: int | None) -> str:
    return ABSENT if size is None else digits(size / 2**20)
