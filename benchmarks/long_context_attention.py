"""Attention to a long cache by itself: our streamed path beside plain F.scaled_dot_product_attention.

Axes: b questions, n query heads, g key heads, r = n / g, l keys, T places, c channels.

Over one cache that many questions share there are three ways to call torch's attention: one question at a
time; all of them as a batch, with keys that are views of one row; all of them as rows of one sequence, which
works only while every query sees every key. None returns the logarithm of the softmax's denominator, without
which the keys of a question's own tokens cannot be merged with those that are shared; here there are none.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.accuracy import WrongResultError, complain
from benchmarks.measure import Budget, Timing, time_in_turns
from moe.attend import attend
from moe.sight import Sight
from moe.streamed_attention import streamed_attention

OURS, ROWS, BATCH, SINGLE = "ours", "sdpa, rows", "sdpa, batch", "sdpa, one at a time"
WHOLE = "sdpa, causal"
NAMES = (OURS, ROWS, BATCH, SINGLE)
SHARP = 1.0  # scale of the logits: with keys of norm sqrt(c), as sharp a softmax as a trained layer's
LONGEST_S = 10.0  # a candidate whose run would take longer is left out
SAMPLE = 64  # places whose result is checked

Attend = Callable[[], Tensor]


def over_cache(queries: Tensor, keys: Tensor, values: Tensor) -> dict[str, Attend]:
    """Queries (b n 1 c) float32 to all keys (1 g l c): each candidate gives (b n 1 c).

    Torch's attention has queries of the cache's dtype; ours on a CPU keeps them as they are, and our kernel
    on a GPU rounds them. Without a copy of the
    keys, a batch is only possible for one key head.
    """
    b, n, _, _ = queries.shape
    g = keys.shape[1]
    narrow = queries.to(keys.dtype)
    rows = rearrange(narrow, "b (g r) 1 c -> 1 g (b r) c", g=g)

    def as_rows() -> Tensor:
        out = F.scaled_dot_product_attention(rows, keys, values, scale=SHARP)
        return rearrange(out, "1 g (b r) c -> b (g r) 1 c", b=b)

    candidates: dict[str, Attend] = {
        OURS: lambda: streamed_attention(queries, keys, values, scale=SHARP).out,
        ROWS: as_rows,
    }
    if g == 1:
        k, v = (x.expand(b, n, -1, -1) for x in (keys, values))
        candidates[BATCH] = lambda: F.scaled_dot_product_attention(narrow, k, v, scale=SHARP)
        candidates[SINGLE] = lambda: torch.cat(
            [F.scaled_dot_product_attention(narrow[i : i + 1], k[:1], v[:1], scale=SHARP) for i in range(b)]
        )
    return candidates


@torch.no_grad()
def measure_over_cache(
    keys: Tensor, values: Tensor, heads: int, rows: int, budget: Budget, earlier: list[dict[str, Any]]
) -> dict[str, Any]:
    """Errors and times of one step of `rows` questions; `earlier` results tell what would take too long."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(rows, heads, 1, keys.shape[3], generator=generator).to(keys.device)
    dtype, tokens = str(keys.dtype).removeprefix("torch."), keys.shape[2]
    candidates = over_cache(queries, keys, values)
    skipped = {name: reason for name in candidates if (reason := _too_long(name, dtype, tokens, earlier))}
    candidates = {name: work for name, work in candidates.items() if name not in skipped}
    truth = streamed_attention(queries.double(), keys, values, scale=SHARP).out
    errors = _errors(candidates, truth, ROWS, tokens)
    skipped |= {name: "takes too much memory" for name in candidates if name not in errors}
    candidates = {name: candidates[name] for name in errors}
    timings = time_in_turns(
        {name: lambda number, work=work: work for name, work in candidates.items()},
        keys.device,
        budget,
    )
    return _result(tokens, dtype, timings, errors) | {"rows": rows, "skipped": skipped}


@torch.no_grad()
def measure_all_pairs(
    tokens: int,
    heads: int,
    channels: int,
    dtype: torch.dtype,
    chunk: int,
    device: torch.device,
    budget: Budget,
) -> dict[str, Any]:
    """Every place to all before it, one key head: ours chunk by chunk, torch's all at once (is_causal).

    Ours is `moe.attend.attend`, which a prefill calls: it takes torch's attention where a chunk sees no key
    but its own, and reads the keys in blocks after that.
    """
    generator = torch.Generator().manual_seed(0)
    draw = (torch.randn(1, h, tokens, channels, generator=generator) for h in (heads, 1, 1))
    queries, keys, values = (x.to(device, dtype) for x in draw)
    everything = Sight(torch.zeros(1, 1, dtype=torch.int64, device=device))  # attend asks for no positions

    def ours() -> Tensor:
        parts = [
            attend(queries[:, :, start:end], keys[:, :, :end], values[:, :, :end], everything, scale=SHARP)
            for start in range(0, tokens, chunk)
            for end in [min(start + chunk, tokens)]
        ]
        return torch.cat(parts, dim=2)

    def whole() -> Tensor:
        k, v = (x.expand(1, heads, -1, -1) for x in (keys, values))
        return F.scaled_dot_product_attention(queries, k, v, is_causal=True, scale=SHARP)

    last = max(0, tokens - SAMPLE)
    truth = streamed_attention(queries[:, :, last:].double(), keys, values, scale=SHARP, first=last).out
    works: dict[str, Attend] = {OURS: ours, WHOLE: whole}
    ends = {name: lambda work=work: work()[:, :, last:] for name, work in works.items()}
    errors = _errors(ends, truth, WHOLE, tokens)
    timings = time_in_turns(
        {name: lambda number, work=work: work for name, work in works.items()}, device, budget
    )
    return _result(tokens, str(dtype).removeprefix("torch."), timings, errors)


def _errors(candidates: dict[str, Attend], truth: Tensor, same_dtype: str, tokens: int) -> dict[str, float]:
    """Largest error of each over the largest value; of those for which there is memory.

    Raises:
        WrongResultError: ours errs more than twice as much as torch's attention in the same dtype.
    """
    outs = {}
    for name, work in candidates.items():
        try:
            outs[name] = work()
        except torch.OutOfMemoryError:
            if name in (OURS, same_dtype):
                raise
    peer = outs[same_dtype]
    if complaint := complain(outs[OURS].to(peer.dtype), peer, truth):
        raise WrongResultError(f"{OURS}, attention to {tokens} places: {complaint}")
    top = truth.abs().max()
    return {name: ((out.double() - truth).abs().max() / top).item() for name, out in outs.items()}


def _too_long(name: str, dtype: str, tokens: int, earlier: list[dict[str, Any]]) -> str | None:
    """Why a candidate is left out, by its time at the longest length before, or None."""
    known = [cell for cell in earlier if cell["dtype"] == dtype]
    if not known:
        return None
    if (reason := known[-1]["skipped"].get(name)) is not None:
        return reason
    if name not in known[-1]["timings"]:
        return None
    seconds = known[-1]["timings"][name]["ms"] / 1e3 * tokens / known[-1]["length"]
    return f"would take about {seconds:.0f} s a run" if seconds > LONGEST_S else None


def _result(tokens: int, dtype: str, timings: dict[str, Timing], errors: dict[str, float]) -> dict[str, Any]:
    return {
        "length": tokens,
        "dtype": dtype,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "errors": errors,
    }
