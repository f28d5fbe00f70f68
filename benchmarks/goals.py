"""The speed goals for two CPU cores (d=512, h=256, k=4, float32), held against what was measured."""

import math
from typing import Any

from benchmarks.candidates import DENSE, HF_GROUPED, OURS
from benchmarks.record import FULL, QUICK

SHAPE, DTYPE = "cpu_small", "float32"
TOKENS = 2048
# experts, backward -> most that our layer may take, as a multiple of the dense layer of equal active FLOPs
DENSE_GOALS = {(16, False): 1.25, (256, False): 1.8, (16, True): 1.4, (256, True): 2.5}
DECODE_GOAL = 1.5  # one token, 256 experts, forward
NEVER_SLOWER = 1.05  # than transformers' grouped_mm, at any size
MEAN_SPEEDUP = 1.2  # over transformers' grouped_mm, forward + backward, geometric mean
IMPORT_GOAL = 2.0  # import moe, as a multiple of import torch


def judge(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal: what it asks, what was measured, whether it is met (None: not measured in this run).

    No goals but for SHAPE in DTYPE on a CPU.
    """
    settings = record["settings"]
    if (settings["shape"], settings["dtype"], record["environment"]["device"]) != (SHAPE, DTYPE, "cpu"):
        return []
    return [
        *(_against_dense(record, TOKENS, e, backward, goal) for (e, backward), goal in DENSE_GOALS.items()),
        _against_dense(record, 1, 256, False, DECODE_GOAL),
        _never_slower(record),
        _mean_speedup(record),
        _imports(record),
    ]


def floor_ms(record: dict[str, Any], result: dict[str, Any]) -> float:
    """The least that forward + backward can take: the dense layer's time, and moving all experts' weights.

    All e experts' weights are read on the way forth and back and their gradients are written: 3 * 3 e d h
    numbers at the measured speed of memory. The dense layer moves k experts' worth, which its time includes.
    """
    settings = record["settings"]
    item = 4 if settings["dtype"] == "float32" else 2
    numbers = 3 * 3 * (result["cell"]["experts"] - settings["k"]) * settings["d"] * settings["h"]
    return result["timings"][DENSE]["ms"] + 1e3 * numbers * item / record["bytes_per_second"]


def ratio(result: dict[str, Any], of: str, to: str) -> float | None:
    """Median time of one candidate as a multiple of another's, or None without both."""
    timings = result["timings"]
    return timings[of]["ms"] / timings[to]["ms"] if of in timings and to in timings else None


def find(record: dict[str, Any], tokens: int, experts: int, backward: bool) -> dict[str, Any] | None:
    """The balanced cell of this size."""
    wanted = {"tokens": tokens, "experts": experts, "backward": backward, "zipf": False}
    return next((result for result in record["results"] if result["cell"] == wanted), None)


def _against_dense(
    record: dict[str, Any], tokens: int, experts: int, backward: bool, goal: float
) -> dict[str, Any]:
    mode = "forward + backward" if backward else "forward"
    text = f"{mode}, t={tokens}, e={experts}: at most {goal} x dense of equal active FLOPs"
    result = find(record, tokens, experts, backward)
    measured = ratio(result, OURS, DENSE) if result else None
    note = ""
    if result and measured and backward and experts >= 256:
        floor = floor_ms(record, result)
        note = f"; {result['timings'][OURS]['ms'] / floor:.2f} x the floor of {floor:.0f} ms"
    return _verdict(text, measured, lambda value: value <= goal, f" x{note}")


def _never_slower(record: dict[str, Any]) -> dict[str, Any]:
    ratios = [(value, r["cell"]) for r in record["results"] if (value := ratio(r, OURS, HF_GROUPED))]
    worst, cell = max(ratios, key=lambda pair: pair[0], default=(None, None))
    where = "" if cell is None else f" x at worst of {len(ratios)} sizes ({describe(cell)})"
    rule = f"at most {NEVER_SLOWER} x at each of the {_sizes(record)}"
    text = f"never slower than transformers' grouped_mm: {rule}"
    return _verdict(text, worst, lambda value: value <= NEVER_SLOWER, where)


def _mean_speedup(record: dict[str, Any]) -> dict[str, Any]:
    speedups = [
        value for r in record["results"] if r["cell"]["backward"] and (value := ratio(r, HF_GROUPED, OURS))
    ]
    mean = math.exp(sum(map(math.log, speedups)) / len(speedups)) if speedups else None
    text = (
        f"forward + backward at least {MEAN_SPEEDUP} x faster than transformers' grouped_mm "
        f"(geometric mean of the {_sizes(record)})"
    )
    return _verdict(text, mean, lambda value: value >= MEAN_SPEEDUP, f" x over {len(speedups)} sizes")


def _sizes(record: dict[str, Any]) -> str:
    return {FULL: "sizes", QUICK: "quick sizes"}.get(record["mode"], "selected sizes")


def _imports(record: dict[str, Any]) -> dict[str, Any]:
    seconds = record["import_seconds"]
    text = f"import moe takes less than {IMPORT_GOAL} x import torch"
    note = f" x ({seconds['moe']:.2f} s against {seconds['torch']:.2f} s)"
    return _verdict(text, seconds["moe"] / seconds["torch"], lambda value: value < IMPORT_GOAL, note)


def _verdict(text: str, measured: float | None, is_met, note: str) -> dict[str, Any]:
    if measured is None:
        return {"goal": text, "measured": None, "met": None, "note": ""}
    return {"goal": text, "measured": measured, "met": bool(is_met(measured)), "note": note}


def describe(cell: dict[str, Any]) -> str:
    """A cell in words."""
    mode = "forward + backward" if cell["backward"] else "forward"
    return f"{mode}, t={cell['tokens']}, e={cell['experts']}, {'Zipf' if cell['zipf'] else 'balanced'}"
