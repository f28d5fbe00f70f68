"""The goals for an H100 in bfloat16, held against what was measured."""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.gpu_candidates import DENSE, LIGER, OURS, TORCH_ONLY, TRANSFORMERS
from benchmarks.gpu_cell import BOTH, FORWARD
from benchmarks.gpu_results import (
    Record,
    Result,
    bandwidth_share,
    find,
    kept_formula,
    layers,
    ms,
    ratio,
    tflops,
)
from benchmarks.published import SONIC, sonic_both

H100 = "H100 SXM"
# shape, tokens -> share of the dense matrix products' speed, forward and forward + backward
DENSE_GOALS = {
    ("qwen3_30b", 8192): (0.68, 0.60),
    ("qwen3_30b", 32768): (0.77, 0.66),
    ("olmoe", 8192): (0.74, 0.66),
    ("mixtral", 8192): (0.86, 0.77),
    ("deepseek_v3", 8192): (0.77, 0.69),
    ("gpt_oss_20b", 8192): (0.80, 0.69),
}
MILLISECONDS = {FORWARD: 0.43, BOTH: 1.25}  # Qwen3-30B-A3B, 128 tokens
BANDWIDTH = 0.75  # of the datasheet's, forward in a CUDA graph, 1 to 16 tokens
LIGER_SPEEDUP = 2.0
TRANSFORMERS_SPEEDUP = 1.5
SONIC_SHARE = 0.85
KEPT = 1.02  # times x and the pre-activation

Verdict = dict[str, Any]


def judge(record: Record) -> list[Verdict]:
    """Each goal: what it asks, what was measured, whether it is met (None: not measured in this run)."""
    if record["dtype"] != "bfloat16" or (record["datasheet"] or {}).get("name") != H100:
        return []
    goals = [
        _against_dense(record, shape, tokens, mode, share)
        for (shape, tokens), shares in DENSE_GOALS.items()
        for mode, share in zip((FORWARD, BOTH), shares, strict=True)
    ]
    goals += [_milliseconds(record, mode, most) for mode, most in MILLISECONDS.items()]
    others = (_decode, _liger, _transformers, _torch_only, _sonic, _memory)
    return [*goals, *(judged(record) for judged in others)]


def _against_dense(record: Record, shape: str, tokens: int, mode: str, share: float) -> Verdict:
    result = find(record, shape, tokens)
    rate = tflops(result, mode, OURS)
    text = f"{shape}, t={tokens}, {mode}: at least {share:.0%} of the speed of dense matrix products"
    note = f" x; {rate or 0:.0f} TFLOP/s"
    return _verdict(text, ratio(result, mode, DENSE, OURS), share, at_least=True, note=note)


def _milliseconds(record: Record, mode: str, most: float) -> Verdict:
    text = f"qwen3_30b, t=128, {mode}: at most {most} ms"
    measured = ms(find(record, "qwen3_30b", 128), mode, OURS, graph=True)
    return _verdict(text, measured, most, note=" ms, CUDA graph")


def _decode(record: Record) -> Verdict:
    text = f"1 to 16 tokens, forward in a CUDA graph: at least {BANDWIDTH:.0%} of the memory's bandwidth"
    found = _over(record, lambda result: bandwidth_share(record, result, OURS), lambda tokens: tokens <= 16)
    return _extreme(text, found, BANDWIDTH, at_least=True)


def _liger(record: Record) -> Verdict:
    text = f"forward + backward at least {LIGER_SPEEDUP:g} x faster than liger-kernel, everywhere"
    found = _over(record, lambda result: ratio(result, BOTH, LIGER, OURS))
    return _extreme(text, found, LIGER_SPEEDUP, at_least=True)


def _transformers(record: Record) -> Verdict:
    text = f"forward + backward at least {TRANSFORMERS_SPEEDUP:g} x faster than transformers, everywhere"
    found = _over(record, lambda result: ratio(result, BOTH, TRANSFORMERS, OURS))
    return _extreme(text, found, TRANSFORMERS_SPEEDUP, at_least=True)


def _torch_only(record: Record) -> Verdict:
    """The fastest of what torch and transformers bring, at every size, forward and forward + backward."""

    def worst(result: Result) -> float | None:
        ratios = [
            value
            for mode in (FORWARD, BOTH)
            for other in TORCH_ONLY
            if (value := ratio(result, mode, OURS, other)) is not None
        ]
        return max(ratios, default=None)

    return _extreme("never slower than torch or transformers, at any size", _over(record, worst), 1.0)


def _sonic(record: Record) -> Verdict:
    text = f"forward + backward at least {SONIC_SHARE:.0%} of SonicMoE's published speed, twelve sizes"
    found = [
        (rate / sonic_both(cell.shape), str(cell))
        for cell, result in layers(record)
        if cell.is_sonic and not cell.zipf and (rate := tflops(result, BOTH, OURS))
    ]
    if len(found) < len(SONIC):
        text += f" ({len(found)} measured)"
    verdict = _extreme(text, found, SONIC_SHARE, at_least=True)
    incomplete = len(found) < len(SONIC) and verdict["met"]
    return verdict | {"met": None} if incomplete else verdict


def _memory(record: Record) -> Verdict:
    text = f"kept for the backward: at most {KEPT:g} x x and the pre-activation"

    def share(result: Result) -> float | None:
        memory = result["memory"].get(OURS)
        return memory["kept"] / kept_formula(record, result) if memory else None

    return _extreme(text, _over(record, share), KEPT)


def _over(
    record: Record,
    value_of: Callable[[Result], float | None],
    fits: Callable[[int], bool] = lambda tokens: True,
) -> list[tuple[float, str]]:
    """A number for each cell that has one, with the cell in words."""
    return [
        (value, str(cell))
        for cell, result in layers(record)
        if fits(cell.tokens) and (value := value_of(result)) is not None
    ]


def _extreme(
    text: str, found: Iterable[tuple[float, str]], bound: float, *, at_least: bool = False
) -> Verdict:
    """The worst of some numbers against a bound."""
    found = list(found)
    value, where = (min if at_least else max)(found, default=(None, ""))
    return _verdict(text, value, bound, at_least=at_least, note=f" at worst of {len(found)}: {where}")


def _verdict(
    text: str, measured: float | None, bound: float, *, at_least: bool = False, note: str = ""
) -> Verdict:
    if measured is None:
        return {"goal": text, "measured": None, "met": None, "note": ""}
    met = measured >= bound if at_least else measured <= bound
    return {"goal": text, "measured": measured, "met": met, "note": note}
