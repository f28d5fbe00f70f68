"""The tables of benchmarks.gpu, made from its JSON."""

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu_candidates import DENSE, EVERYONE_ELSE, OURS, OURS_SORTED
from benchmarks.gpu_cell import BOTH, FORWARD, TRAINING
from benchmarks.gpu_results import (
    Record,
    bandwidth_share,
    cell_of,
    floor_ms,
    kept_formula,
    layers,
    ms,
    ratio,
    tflops,
)
from benchmarks.layer_tables import ABSENT, goals_table
from benchmarks.measure import Timing, digits
from benchmarks.published import LIGER, LIGER_SOURCE, SONIC, SONIC_SOURCE, sonic_both
from benchmarks.record import headline, table
from benchmarks.roofline import Work

SHOWN = (DENSE, OURS, OURS_SORTED, *EVERYONE_ELSE)


def render(record: Record) -> str:
    """Everything as Markdown; the goals last."""
    parts = [
        _head(record),
        _times(record, FORWARD),
        _times(record, BOTH),
        _graphs(record),
        *_passes(record),
        *_operations(record),
        _sonic(record),
        _published_liger(record),
        _memory(record),
        _not_run(record),
        goals_table(record) if "goals" in record else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _head(record: Record) -> str:
    facts, rates, sheet = record["environment"], record["rates"], record["datasheet"]
    stated = f"; {_rates(sheet)} by the datasheet" if sheet else ""
    return (
        f"{headline(facts)}, driver {facts['driver']}\n\n"
        f"{record['dtype']}; {_rates(rates)} measured{stated}. "
        f"Milliseconds: median (p20-p80), candidates in turns, cold L2, from the chosen experts on. "
        f"dense: only the matrix products, as one expert. "
        f"% of floor: the roofline at the measured rates over our time."
    )


def _times(record: Record, mode: str) -> str:
    cells = [(cell, result) for cell, result in layers(record) if result["timings"].get(mode)]
    names = [name for name in SHOWN if any(name in result["timings"][mode] for _, result in cells)]
    if not cells:
        return ""
    head = ["size", *names, "ours TFLOP/s", "% of dense", "% of floor", "datasheet", "MaxVio"]
    rows = [
        [
            str(cell),
            *(_timing(result["timings"][mode].get(name)) for name in names),
            _number(tflops(result, mode, OURS), 0),
            _share(ratio(result, mode, DENSE, OURS)),
            _share(_over(floor_ms(record, result, mode), ms(result, mode, OURS))),
            _share(_over(floor_ms(record, result, mode, datasheet=True), ms(result, mode, OURS))),
            f"{result['max_violation']:.1f}",
        ]
        for cell, result in cells
    ]
    return f"**{mode.capitalize()}**, ms\n\n{table(head, rows)}"


def _graphs(record: Record) -> str:
    cells = [(cell, result) for cell, result in layers(record) if any(result["graphs"].values())]
    names = [n for n in SHOWN if any(n in timings for _, r in cells for timings in r["graphs"].values())]
    if not cells:
        return ""
    rows = [
        [
            f"{cell}, {mode}",
            *(_timing(result["graphs"][mode].get(name)) for name in names),
            _share(bandwidth_share(record, result, OURS)) if mode == FORWARD else ABSENT,
            _share(_over(floor_ms(record, result, mode), ms(result, mode, OURS, graph=True))),
        ]
        for cell, result in cells
        for mode in result["graphs"]
    ]
    head = ["size", *names, "% of bandwidth (datasheet)", "% of floor"]
    return f"**In a CUDA graph**, ms\n\n{table(head, rows)}"


def _passes(record: Record) -> Iterable[str]:
    for result in record["results"]:
        if "passes" in result:
            yield _works(f"**Passes of ours**, {cell_of(result)}", result["passes"], record)


def _operations(record: Record) -> Iterable[str]:
    for result in record["results"]:
        if "operations" in result:
            yield _works(f"**Operations of level 1**, {cell_of(result)}", result["operations"], record)


def _works(title: str, works: dict[str, dict[str, Any]], record: Record) -> str:
    """Time, rates, and the share of the roofline's floor at measured rates and at the datasheet's."""
    head = ["", "ms", "TFLOP/s", "GB/s", "% of floor", "datasheet", "% of copy"]
    rows = []
    for name, entry in works.items():
        if "failed" in entry:
            rows.append([name, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT])
            continue
        work, seconds = Work(name, entry["flops"], entry["bytes"]), entry["ms"] / 1e3
        floors = [
            work.floor_s(rates["flops_per_second"], rates["bytes_per_second"]) if rates else None
            for rates in (record["rates"], record["datasheet"])
        ]
        speed = work.bytes / seconds
        rows.append(
            [
                name,
                digits(entry["ms"]),
                _number(work.flops / seconds / 1e12, 0) if work.flops else ABSENT,
                _number(speed / 1e9, 0) if work.bytes else ABSENT,
                *(_share(floor / seconds if floor else None) for floor in floors),
                _share(speed / record["rates"]["bytes_per_second"] if work.bytes else None),
            ]
        )
    failed = "".join(f"\n\n{name}: {e['failed']}" for name, e in works.items() if "failed" in e)
    return f"{title}\n\n{table(head, rows)}{failed}"


def _sonic(record: Record) -> str:
    cells = [(cell, result) for cell, result in layers(record) if cell.is_sonic and not cell.zipf]
    if not cells:
        return ""
    head = ["size", "forward published", "ours", "backward published", "both published", "ours", "%", DENSE]
    rows = []
    for cell, result in cells:
        forward, backward = SONIC[cell.shape]
        rate, both = tflops(result, BOTH, OURS), sonic_both(cell.shape)
        rows.append(
            [
                str(cell),
                f"{forward:.0f}",
                _number(tflops(result, TRAINING, OURS), 0),
                f"{backward:.0f}",
                f"{both:.0f}",
                _number(rate, 0),
                _share(rate / both if rate else None),
                _number(tflops(result, BOTH, DENSE), 0),
            ]
        )
    return f"**SonicMoE's sizes**, TFLOP/s; published: {SONIC_SOURCE}\n\n{table(head, rows)}"


def _published_liger(record: Record) -> str:
    rows = [
        [str(cell), *(f"{value:g}" for value in LIGER[cell.shape, cell.tokens]),
         *(_number(ms(result, mode, OURS), 3) for mode in (FORWARD, BOTH))]
        for cell, result in layers(record)
        if (cell.shape, cell.tokens) in LIGER and not cell.zipf
    ]  # fmt: skip
    head = ["size", "forward published", "both published", "forward ours", "both ours"]
    title = f"**Liger-Kernel's own figures**, ms; published: {LIGER_SOURCE}"
    return f"{title}\n\n{table(head, rows)}" if rows else ""


def _memory(record: Record) -> str:
    cells = [(cell, result) for cell, result in layers(record) if result["memory"]]
    names = [name for name in SHOWN if any(name in result["memory"] for _, result in cells)]
    if not cells:
        return ""
    rows = [
        [
            str(cell),
            f"{kept_formula(record, result) / 2**20:.0f}",
            *(_kept_and_peak(result["memory"].get(name)) for name in names),
        ]
        for cell, result in cells
    ]
    return (
        "**Memory**, MiB: kept for the backward (x included) / peak of forward + backward "
        f"(gradients included, weights not)\n\n{table(['size', '2td + 4ph', *names], rows)}"
    )


def _not_run(record: Record) -> str:
    lines = [
        f"- {cell_of(result)}: {name}: {reason}"
        for result in record["results"]
        for name, reason in result["skipped"].items()
    ]
    lines += [f"- {cell}: {reason}" for cell, reason in record["left_out"].items()]
    return "\n".join(["Not run:", "", *lines]) if lines else ""


def _kept_and_peak(memory: dict[str, int] | None) -> str:
    return f"{memory['kept'] / 2**20:.0f} / {memory['peak'] / 2**20:.0f}" if memory else ABSENT


def _timing(timing: dict[str, Any] | None) -> str:
    return str(Timing(**timing)) if timing else ABSENT


def _number(value: float | None, places: int) -> str:
    return ABSENT if value is None else f"{value:.{places}f}"


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.0%}"


def _over(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def _rates(rates: dict[str, Any]) -> str:
    flops, moved = rates["flops_per_second"], rates["bytes_per_second"]
    return f"{flops / 1e12:.0f} TFLOP/s, {moved / 1e12:.2f} TB/s"
