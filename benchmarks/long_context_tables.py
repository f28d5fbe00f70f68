"""The tables of benchmarks.long_context, made from its JSON."""

from typing import Any

from benchmarks.layer_tables import ABSENT, goals_table
from benchmarks.long_context_attention import NAMES, OURS, ROWS, WHOLE
from benchmarks.long_context_goals import ms_an_answer, read_bytes_per_second
from benchmarks.long_context_peer import THEIRS
from benchmarks.long_context_reading import ALONE, EARLY, MIDDLE, TOGETHER
from benchmarks.long_context_reading import WHOLE as ONE_PASS
from benchmarks.measure import Timing, digits
from benchmarks.record import headline, table
from moe.probes.needle.table import format_bytes, format_count, format_length, format_percent

WORK = "prefill", "training"  # whose cost is compared as experts are added

Record = dict[str, Any]


def render(record: Record) -> str:
    """Everything as Markdown; the goals last."""
    parts = [
        _head(record),
        _reading(record),
        _answering(record),
        _over_cache(record),
        _strict(record),
        _all_pairs(record),
        _peer(record),
        _experts(record),
        _recall(record),
        _left_out(record),
        goals_table(record),
    ]
    return "\n\n".join(part for part in parts if part)


def _head(record: Record) -> str:
    model, rates = record["model"], record["rates"]
    return (
        f"{headline(record['environment'])}\n\n"
        f"{model['weights']}: {format_count(model['total'])} parameters, {format_count(model['active'])} "
        f"active, layers {model['pattern']}, {model['path']}. A token is a byte. Median (p20-p80), all timed "
        f"in turns. Plain matrix product {rates['flops_per_second'] / 1e9:.0f} GFLOP/s in "
        f"{rates['dtype']}; memory {rates['bytes_per_second'] / 1e9:.1f} GB/s copied, a byte read and a byte "
        f"written counted as two."
    )


def _reading(record: Record) -> str:
    if not record["reading"]:
        return ""
    head = ["tokens", "cache", "read in s", "tokens/s", "cache MB", "peak", "logits from float32"]
    rows = [
        [
            format_length(cell["length"]),
            dtype,
            _seconds(timing),
            f"{cell['length'] / timing['ms'] * 1e3:,.0f}",
            f"{answered['cache_bytes'] / 1e6:.1f}" if answered else ABSENT,
            format_bytes(answered["peak_bytes"]) if answered and answered["peak_bytes"] else ABSENT,
            _error(answered["logit_difference"]) if answered else ABSENT,
        ]
        for cell in record["reading"]
        for dtype, timing in cell["timings"].items()
        for answered in [_answered(record, cell["length"], dtype)]
    ]
    return f"**Reading a text into a cache**\n\n{table(head, rows)}"


def _answering(record: Record) -> str:
    if not record["answering"]:
        return ""
    together = max(cell["questions"][TOGETHER] for cell in record["answering"])
    head = [
        "tokens",
        "cache",
        f"{together} a read, ms an answer",
        "one a read, ms an answer",
        "gain",
        f"cache GB/s, {together} a read",
        "cache GB/s, one a read",
        "of memory's speed, one a read",
    ]
    rows = []
    for cell in record["answering"]:
        rates = [read_bytes_per_second(cell, how) for how in (TOGETHER, ALONE)]
        rows.append(
            [
                format_length(cell["length"]),
                cell["dtype"],
                *(_timing(cell["answering"][how], cell["questions"][how]) for how in (TOGETHER, ALONE)),
                f"{ms_an_answer(cell, ALONE) / ms_an_answer(cell, TOGETHER):.1f} x",
                *(digits(rate / 1e9) for rate in rates),
                f"{rates[1] / record['rates']['bytes_per_second']:.0%}",
            ]
        )
    steps = record["answering"][0]["steps"]
    return (
        f"**Answers of {steps} digits, greedily, the whole cache read for each digit**\n\n{table(head, rows)}"
    )


def _over_cache(record: Record) -> str:
    cells = [cell["attention"] for cell in record["answering"]]
    if not cells:
        return ""
    names = [name for name in NAMES if any(name in cell["timings"] for cell in cells)]
    return (
        f"**One step of {cells[0]['rows']} questions: the attention to the cache alone, ms**\n\n"
        f"{_candidates(cells, names, ROWS)}\n\n"
        f"{_errors_line(cells, names)}"
    )


def _all_pairs(record: Record) -> str:
    cells = record["all_pairs"]
    if not cells:
        return ""
    head = ["places", "dtype", f"{OURS}, ms", f"{WHOLE}, ms", f"{WHOLE} / ours", "ours GFLOP/s", "% of GEMM"]
    rows = []
    for cell in cells:
        rate = cell["flops"] / cell["timings"][OURS]["ms"] * 1e3
        rows.append(
            [
                format_length(cell["length"]),
                cell["dtype"],
                *(str(Timing(**cell["timings"][name])) for name in (OURS, WHOLE)),
                _ratio(cell["timings"], WHOLE, OURS),
                f"{rate / 1e9:.0f}",
                f"{rate / record['rates']['flops_per_second']:.0%}",
            ]
        )
    errors = _errors_line(cells, [OURS, WHOLE])
    return f"**Attention of every place to all before it, alone**\n\n{table(head, rows)}\n\n{errors}"


def _strict(record: Record) -> str:
    cells = record["strict"]
    if not cells:
        return ""
    head = ["tokens", "cache", "way", "s", "tokens/s", "all pairs, TFLOP", "GFLOP/s", "% of GEMM", "peak"]
    rows = []
    for cell in cells:
        for name in cell["timings"]:
            timing, flops = cell["timings"][name], cell["flops"][name]
            rate = flops / timing["ms"] * 1e3
            rows.append(
                [
                    format_length(cell["length"]),
                    ABSENT if name == ONE_PASS else cell["dtype"],
                    name,
                    _seconds(timing),
                    f"{cell['length'] / timing['ms'] * 1e3:,.0f}",
                    f"{flops / 1e12:.3g}" if flops else ABSENT,
                    f"{rate / 1e9:.0f}" if flops else ABSENT,
                    f"{rate / record['rates']['flops_per_second']:.0%}" if flops else ABSENT,
                    format_bytes(cell["peak_bytes"][name]) if cell["peak_bytes"][name] else ABSENT,
                ]
            )
    return (
        f"**Every pair of places: whole prefills**\n\n{table(head, rows)}\n\n"
        f"{EARLY}: the same layers without the pairs of the last one. {MIDDLE}: one layer more, the full one "
        f"third of four. GFLOP/s are those of the pairs over the time of everything."
    )


def _peer(record: Record) -> str:
    peer = record["peer"]
    if not peer:
        return ""
    rows = [
        [
            what,
            *(_timing(peer[key][name]) for name in ("ours", THEIRS)),
            _ratio(peer[key], THEIRS, "ours"),
        ]
        for what, key in (
            (f"read {format_length(peer['length'])}", "reading"),
            ("one answer", "answering"),
        )
    ]
    head = ["", "ours, ms", f"{THEIRS}, ms", f"{THEIRS} / ours"]
    return (
        f"**Beside transformers**: Qwen3-MoE of the same widths, {peer['layers']} full layers, F.sdpa, "
        f"DynamicCache\n\n{table(head, rows)}"
    )


def _experts(record: Record) -> str:
    experts = record["experts"]
    if not experts:
        return ""
    head = ["model", "total", "active", "prefill, µs a token", "training step, µs a token"]
    tokens = experts["prefill_tokens"], experts["training_tokens"]
    rows = [
        [
            name,
            format_count(model["total"]),
            format_count(model["active"]),
            *(_timing(experts[what][name], count / 1e3) for what, count in zip(WORK, tokens, strict=True)),
        ]
        for name, model in zip(experts["names"], experts["models"], strict=True)
    ]
    few, least = experts["names"][0], experts["models"][0]
    rows += [
        [
            f"{name} / {few}",
            *(f"{model[key] / least[key]:.2f}" for key in ("total", "active")),
            *(f"{experts[what][name]['ms'] / experts[what][few]['ms']:.2f}" for what in WORK),
        ]
        for name, model in zip(experts["names"][1:], experts["models"][1:], strict=True)
    ]
    return (
        f"**More experts, two of them for each token**: prefill of {format_length(tokens[0])} tokens, "
        f"training steps of {tokens[1]}\n\n{table(head, rows)}"
    )


def _recall(record: Record) -> str:
    if not record["recall"]:
        return ""
    head = ["model", "run, step", "tokens", "template", "haystacks", "n", "right", "recall %", ">= %"]
    rows = [
        [
            row["name"],
            f"{row['run']}, {row['step']}",
            format_length(row["length"]),
            row["template"],
            str(row["haystacks"]),
            str(row["asked"]),
            str(row["right"]),
            format_percent(row["right"] / row["asked"]),
            format_percent(row["lower_bound"]),
        ]
        for row in record["recall"]
    ]
    return f"**What they find** (>=: one-sided 95 % bound)\n\n{table(head, rows)}"


def _left_out(record: Record) -> str:
    lines = [f"- {what}: {reason}" for what, reason in record["left_out"].items()]
    lines += [
        f"- {name}, {format_length(cell['length'])}, {cell['attention']['dtype']}: {reason}"
        for cell in record["answering"]
        for name, reason in cell["attention"]["skipped"].items()
    ]
    return "\n".join(["Not run (-):", "", *lines]) if lines else ""


def _candidates(cells: list[dict[str, Any]], names: list[str], peer: str) -> str:
    head = ["keys", "cache", *names, f"{peer} / ours"]
    rows = [
        [
            format_length(cell["length"]),
            cell["dtype"],
            *(str(Timing(**cell["timings"][name])) if name in cell["timings"] else ABSENT for name in names),
            _ratio(cell["timings"], peer, OURS),
        ]
        for cell in cells
    ]
    return table(head, rows)


def _errors_line(cells: list[dict[str, Any]], names: list[str]) -> str:
    """The largest error of each candidate in each dtype, over the largest value."""
    parts = [
        f"{dtype} "
        + ", ".join(
            f"{name} {_error(max(errors))}"
            for name in names
            if (errors := [c["errors"][name] for c in cells if c["dtype"] == dtype and name in c["errors"]])
        )
        for dtype in dict.fromkeys(cell["dtype"] for cell in cells)
    ]
    return f"Largest errors against float64, of the largest value: {'; '.join(parts)}."


def _answered(record: Record, length: int, dtype: str) -> dict[str, Any] | None:
    return next(
        (cell for cell in record["answering"] if (cell["length"], cell["dtype"]) == (length, dtype)), None
    )


def _timing(timing: dict[str, Any], parts: float = 1) -> str:
    """Milliseconds of one of so many equal parts."""
    shown = {key: timing[key] / parts for key in ("ms", "p20", "p80")}
    return str(Timing(**shown, runs=timing["runs"]))


def _seconds(timing: dict[str, Any]) -> str:
    return _timing(timing, 1e3)


def _ratio(timings: dict[str, Any], of: str, to: str) -> str:
    return f"{timings[of]['ms'] / timings[to]['ms']:.2f}"


def _error(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.0e}" if value else "0"
