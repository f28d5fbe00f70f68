"""The goals and tables of benchmarks.gpu_needle, made from its JSON."""

from typing import Any

from benchmarks.layer_tables import ABSENT, goals_table
from benchmarks.long_context_goals import verdict
from benchmarks.record import headline, table
from moe.probes.needle.record import NeedleRecord, NeedleRow
from moe.probes.needle.table import format_bytes, format_count, format_length, format_percent, needle_table
from moe.probes.statistics import lower_bound

# part -> tokens, least right answers of each template, of so many, over so many haystacks
RECALL_GOALS = {"recall-1M": (2**20, 997, 1000, 10), "recall-10M": (10**7, 496, 500, 5)}
# part -> tokens, most seconds
STRICT_GOALS = {"strict-1M": (2**20, 60.0), "strict-10M": (10**7, 480.0)}
STRICT_RECALL, STRICT_SHARE, STRICT_LEAST = "strict-recall-1M", 0.99, 100  # share of at least so many
TEMPLATES = "key_value", "sentence"

Record = dict[str, Any]


def judge(record: Record) -> list[dict[str, Any]]:
    """Each goal: what it asks, what was measured, whether it is met (None: not measured in this run)."""
    return [
        *(_recall_goal(record, part, name) for part in RECALL_GOALS for name in TEMPLATES),
        *(_time_goal(record, part) for part in STRICT_GOALS),
        *(_strict_recall_goal(record, name) for name in TEMPLATES),
    ]


def render(record: Record) -> str:
    """Everything as Markdown; the goals last."""
    parts = [
        _head(record),
        _recall(record),
        _strict(record),
        _left_out(record),
        goals_table(record) if "goals" in record else "",
    ]
    return "\n\n".join(part for part in parts if part)


def rows_of(record: Record) -> list[NeedleRow]:
    """The recall as rows of an evaluation: one for each length and template."""
    return [
        _row(record, found, template)
        for found in record["recall"].values()
        if found["haystacks"]
        for template in dict.fromkeys(name for name, _, _ in found["haystacks"][0]["answers"])
    ]


def _row(record: Record, found: dict[str, Any], template: str) -> NeedleRow:
    haystacks, model = found["haystacks"], record["model"]
    mine = [(d, right) for one in haystacks for name, d, right in one["answers"] if name == template]
    asked = sum(len(one["answers"]) for one in haystacks)
    texts = [one["text"] for one in haystacks]
    return NeedleRow(
        run=model["run"],
        step=model["step"],
        total=model["total"],
        active=model["active"],
        variant="",
        length=found["length"],
        template=template,
        haystacks=len(haystacks),
        needles=haystacks[0]["needles"],
        depths=tuple(depth for depth, _ in mine),
        correct=tuple(right for _, right in mine),
        prefill_seconds=sum(one["prefill_seconds"] for one in haystacks) / len(haystacks),
        answer_seconds=sum(one["answer_seconds"] for one in haystacks) * len(mine) / asked,
        cache_bytes=max(one["cache_bytes"] for one in haystacks),
        peak_bytes=max(one["peak_bytes"] for one in haystacks),
        path=haystacks[0]["path"],
        dtype=record["dtypes"]["recall"],
        text={
            "root": texts[0]["root"],
            "digest": " ".join(text["digest"][:16] for text in texts),
            "files": sum(text["files"] for text in texts),
            "repeated": any(text["repeated"] for text in texts),
        },
        trained_length=model["trained_length"],
    )


def _head(record: Record) -> str:
    facts, model, training, rates = (record[name] for name in ("environment", "model", "training", "rates"))
    lines = [f"{headline(facts)}, driver {facts['driver']}", ""]
    if model:
        size = f"{format_count(model['total'])} parameters, {format_count(model['active'])} active"
        lines.append(f"{model['run']}, step {model['step']}: {size}; a token is a byte.")
    if training:
        changes = ", ".join(f"{key}={value}" for key, value in training["changes"].items())
        lines.append(
            f"Trained in {training['seconds']:.0f} s: {training['steps']} steps of {training['step_ms']:.0f} "
            f"ms, the preset `needle` with {changes}."
        )
    lines.append(
        f"Plain matrix product {rates['flops_per_second'] / 1e12:.3g} TFLOP/s in "
        f"{record['dtypes']['strict']}; memory {rates['bytes_per_second'] / 1e12:.3g} TB/s copied."
    )
    return "\n".join(lines)


def _recall(record: Record) -> str:
    rows = rows_of(record)
    if not rows:
        return ""
    return "\n".join(["**Recall**, every question alone", "", *needle_table(NeedleRecord(tuple(rows), {}))])


def _strict(record: Record) -> str:
    found = record["strict"]
    if not found:
        return ""
    head = [
        *("", "layers", "weights", "tokens", "cache", "s", "tokens/s", "all pairs, PFLOP", "TFLOP/s"),
        *("% of GEMM", "memory (cache / peak)", "right"),
    ]
    rows = []
    for part, cell in found.items():
        rate = cell["flops"] / cell["seconds"]
        right = ", ".join(f"{t['template']} {t['right']}/{t['asked']}" for t in cell["recall"])
        rows.append(
            [
                part,
                cell["pattern"],
                cell["weights"],
                format_length(cell["length"]),
                cell["dtype"],
                f"{cell['seconds']:.1f}",
                f"{cell['length'] / cell['seconds']:,.0f}",
                f"{cell['flops'] / 1e15:.3g}",
                f"{rate / 1e12:.3g}",
                f"{rate / record['rates']['flops_per_second']:.0%}",
                f"{format_bytes(cell['cache_bytes'])} / {format_bytes(cell['peak_bytes'])}",
                right or ABSENT,
            ]
        )
    ways = "\n".join(f"- {part}: {cell['path']}" for part, cell in found.items())
    return (
        f"**Exact attention of all pairs of places**\n\n{table(head, rows)}\n\n"
        f"PFLOP: 2 T² n c of each full layer, causal, nothing else counted; TFLOP/s: those over the time of "
        f"the whole prefill.\n\n{ways}"
    )


def _left_out(record: Record) -> str:
    lines = [f"- {part}: {reason}" for part, reason in record["left_out"].items()]
    return "\n".join(["Left out or cut short:", "", *lines]) if lines else ""


def _recall_goal(record: Record, part: str, template: str) -> dict[str, Any]:
    tokens, right, asked, haystacks = RECALL_GOALS[part]
    text = f"{format_length(tokens)}, {template}: at least {right} of {asked} over {haystacks} haystacks"
    row = next((r for r in rows_of(record) if (r.length, r.template) == (tokens, template)), None)
    if row is None:
        return verdict(text, None, right / asked)
    complete = row.asked >= asked and row.haystacks >= haystacks
    note = f" % ({row.right}/{row.asked} over {row.haystacks}, >= {format_percent(row.lower_bound)} %)"
    judged = verdict(text, 100 * row.recall, 100 * right / asked, at_least=True, note=note)
    return judged if complete or not judged["met"] else judged | {"met": None}


def _time_goal(record: Record, part: str) -> dict[str, Any]:
    tokens, seconds = STRICT_GOALS[part]
    text = f"every pair of {format_length(tokens)} places, the full layer in the middle: under {seconds:g} s"
    cell = record["strict"].get(part)
    if cell is None or cell["length"] != tokens:
        return verdict(text, None, seconds)
    return verdict(text, cell["seconds"], seconds, note=" s")


def _strict_recall_goal(record: Record, template: str) -> dict[str, Any]:
    text = f"every pair of 1M places, {template}: at least {STRICT_SHARE:.0%} of {STRICT_LEAST} questions"
    cell = record["strict"].get(STRICT_RECALL)
    found = [t for t in cell["recall"] if t["template"] == template] if cell else []
    if not cell or not found or cell["length"] != RECALL_GOALS["recall-1M"][0]:
        return verdict(text, None, STRICT_SHARE)
    right, asked = found[0]["right"], found[0]["asked"]
    note = f" % ({right}/{asked}, >= {format_percent(lower_bound(right, asked))} %)"
    judged = verdict(text, 100 * right / asked, 100 * STRICT_SHARE, at_least=True, note=note)
    return judged if asked >= STRICT_LEAST or not judged["met"] else judged | {"met": None}
