"""The goals of a long context, held against what was measured."""

from typing import Any

from benchmarks.long_context_attention import OURS, ROWS, WHOLE
from benchmarks.long_context_reading import TOGETHER
from benchmarks.statistics import fisher_lower
from moe.probes.needle.table import format_length

MORE_EXPERTS = 1.2  # times a token's cost at most, with four times the experts
SIGNIFICANT = 0.05  # one-sided p from which a lower recall is not luck any more
NEVER_SLOWER = 1.05
MILLION, TEN_MILLION = 2**20, 10**7
ANSWER_MS = 50.0  # at a million tokens on two cores, float32, questions together
# length -> questions, haystacks, minutes at most on two cores
SITTINGS = {MILLION: (300, 3, 2.0), TEN_MILLION: (500, 2, 15.0)}
PEAK_BYTES = 8e9  # of ten million tokens, in the dtype that takes least

Record = dict[str, Any]


def judge(record: Record) -> list[dict[str, Any]]:
    """Each goal: what it asks, what was measured, whether it is met (None: not measured in this run)."""
    goals = [*_experts(record, "prefill"), *_experts(record, "training"), _recall(record)]
    if record["environment"]["device"] == "cpu":
        goals.append(_answer(record))
        goals += [_sitting(record, length) for length in SITTINGS]
        goals.append(_memory(record))
    return [*goals, _over_cache(record), _all_pairs(record)]


def ms_an_answer(cell: dict[str, Any], how: str) -> float:
    """Milliseconds of one answer."""
    return cell["answering"][how]["ms"] / cell["questions"][how]


def read_bytes_per_second(cell: dict[str, Any], how: str) -> float:
    """Bytes of the cache read a second: all of them for each digit, once for all questions together."""
    reads = cell["steps"] * (1 if how == TOGETHER else cell["questions"][how])
    return reads * cell["cache_bytes"] / (cell["answering"][how]["ms"] / 1e3)


def _experts(record: Record, what: str) -> list[dict[str, Any]]:
    """In each model of more experts than the first one has a token may cost little more."""
    experts = record["experts"]
    if not experts:
        return []
    (few, *others), (least, *sizes) = experts["names"], experts["models"]
    step = "prefill" if what == "prefill" else "a training step"
    return [
        verdict(
            f"{step}: a token of {many} ({size['total'] / least['total']:.1f} x the parameters) costs at "
            f"most {MORE_EXPERTS} x one of {few}",
            experts[what][many]["ms"] / experts[what][few]["ms"],
            MORE_EXPERTS,
            note=" x",
        )
        for many, size in zip(others, sizes, strict=True)
    ]


def _recall(record: Record) -> dict[str, Any]:
    text = f"recall of more experts is not lower: Fisher's one-sided p at least {SIGNIFICANT}"
    found = record["recall"]
    names = list(dict.fromkeys(row["name"] for row in found))
    if len(names) < 2:
        return verdict(text, None, SIGNIFICANT)
    (few, few_asked), (many, many_asked) = (
        [sum(row[key] for row in found if row["name"] == name) for key in ("right", "asked")]
        for name in names
    )
    note = f": {names[0]} {few}/{few_asked}, {names[1]} {many}/{many_asked}"
    p = fisher_lower(many, many_asked, few, few_asked)
    return verdict(text, p, SIGNIFICANT, at_least=True, note=note)


def _answer(record: Record) -> dict[str, Any]:
    text = f"an answer about {format_length(MILLION)} tokens, 64 together, float32: at most {ANSWER_MS:g} ms"
    cells = [cell for cell in _cells(record, MILLION) if cell["dtype"] == "float32"]
    return verdict(text, ms_an_answer(cells[0], TOGETHER) if cells else None, ANSWER_MS, note=" ms")


def _sitting(record: Record, length: int) -> dict[str, Any]:
    """The time of a whole evaluation, from its parts, in the fastest dtype."""
    questions, haystacks, most = SITTINGS[length]
    text = f"{format_length(length)}: {questions} questions about {haystacks} haystacks in {most:g} minutes"
    reading = next((cell["timings"] for cell in record["reading"] if cell["length"] == length), {})
    minutes = {
        cell["dtype"]: (haystacks * reading[cell["dtype"]]["ms"] + questions * ms_an_answer(cell, TOGETHER))
        / 60e3
        for cell in _cells(record, length)
    }
    best = min(minutes, key=minutes.__getitem__, default=None)
    return verdict(text, None if best is None else minutes[best], most, note=f" minutes, {best}")


def _memory(record: Record) -> dict[str, Any]:
    text = f"{format_length(TEN_MILLION)}: at most {PEAK_BYTES / 1e9:g} GB while reading"
    peaks = {cell["dtype"]: cell["peak_bytes"] for cell in _cells(record, TEN_MILLION) if cell["peak_bytes"]}
    best = min(peaks, key=peaks.__getitem__, default=None)
    measured = None if best is None else peaks[best] / 1e9
    return verdict(text, measured, PEAK_BYTES / 1e9, note=f" GB, {best}")


def _over_cache(record: Record) -> dict[str, Any]:
    text = f"64 questions over a cache: never slower than F.sdpa's fastest way, within {NEVER_SLOWER} x"
    found = [
        (cell["timings"][OURS]["ms"] / cell["timings"][ROWS]["ms"], cell)
        for cell in (answered["attention"] for answered in record["answering"])
    ]
    return _worst(text, found)


def _all_pairs(record: Record) -> dict[str, Any]:
    text = f"attention of all pairs: never slower than F.sdpa, within {NEVER_SLOWER} x"
    return _worst(
        text, [(c["timings"][OURS]["ms"] / c["timings"][WHOLE]["ms"], c) for c in record["all_pairs"]]
    )


def _worst(text: str, found: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    value, cell = max(found, key=lambda pair: pair[0], default=(None, None))
    where = "" if cell is None else f" ({format_length(cell['length'])}, {cell['dtype']})"
    return verdict(text, value, NEVER_SLOWER, note=f" x at worst of {len(found)}{where}")


def _cells(record: Record, length: int) -> list[dict[str, Any]]:
    return [cell for cell in record["answering"] if cell["length"] == length]


def verdict(
    text: str, measured: float | None, bound: float, *, at_least: bool = False, note: str = ""
) -> dict[str, Any]:
    """A goal as the tables show it; measured=None was not measured."""
    if measured is None:
        return {"goal": text, "measured": None, "met": None, "note": ""}
    met = measured >= bound if at_least else measured <= bound
    return {"goal": text, "measured": measured, "met": bool(met), "note": note}
