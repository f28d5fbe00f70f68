"""Attention over one long cache as each candidate computes it, and the float64 truth on a sample of rows.

b sequences, s queries, n query heads, one head of keys, l keys, c channels; m rows (b n s).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.gpu_attention_tables import OURS
from moe_triton import attention_over_cache
from moe_triton.attention_schedule import Schedule, cut, override
from moe_triton.launch import target_of

FLASH, EFFICIENT, FLEX = "sdpa flash", "sdpa efficient", "flex_attention"
HEADS = 2  # query heads, which share one head of keys
SPREAD = 3.0  # standard deviation of the logits: of a million keys some hundred have most of the weight
SAMPLE = 32  # rows whose result is checked
STEP = 1 << 16  # keys at a time, for the truth
FLEX_BLOCK = 128
# Tiles that might be better than the chosen ones, by channels.
ALTERNATIVES = {
    64: (Schedule(128, 128, 8, 3), Schedule(128, 64, 8, 3, 2), Schedule(64, 128, 4, 3, 2)),
    128: (Schedule(128, 64, 8, 3), Schedule(64, 128, 8, 2), Schedule(64, 64, 4, 3, 2)),
}

Attend = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """queries (b n s c), keys and values (1 1 l c); causal: query i sees the keys 0 to l - s + i."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    causal: bool

    @property
    def scale(self) -> float:
        """Of the logits."""
        return SPREAD / self.keys.shape[3] ** 0.5

    @property
    def first(self) -> int | None:
        """The last key that query 0 sees; None where every query sees all."""
        return self.keys.shape[2] - self.queries.shape[2] if self.causal else None

    @property
    def flops(self) -> float:
        """Two products of c channels for every query row and key that it sees."""
        b, n, s, c = self.queries.shape
        return 4.0 * b * n * c * (s * self.keys.shape[2] - (s * (s - 1) / 2 if self.causal else 0))

    @property
    def bytes(self) -> float:
        """Keys and values once, queries, and the output in the queries' dtype."""
        return float(self.keys.nbytes + self.values.nbytes + 2 * self.queries.nbytes)


def make_problem(
    sequences: int, queries: int, keys: int, channels: int, *, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Random numbers; causal where a sequence has several queries."""
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, device=device, dtype=dtype, generator=generator)
    cache = [randn(1, 1, keys, channels) for _ in range(2)]
    return Problem(randn(sequences, HEADS, queries, channels), *cache, causal=queries > 1)


def make_candidates(problem: Problem) -> dict[str, Attend]:
    """Each gives out (b n s c). Peers that answer get all rows as one sequence: one reading of the cache."""
    return {
        OURS: lambda: attention_over_cache(
            problem.queries, problem.keys, problem.values, problem.scale, problem.first
        )[0],
        FLASH: _sdpa(problem, SDPBackend.FLASH_ATTENTION),
        EFFICIENT: _sdpa(problem, SDPBackend.EFFICIENT_ATTENTION),
        FLEX: _flex(problem),
    }


def make_alternatives(problem: Problem) -> dict[str, Attend]:
    """Ours with other tiles than the chosen one."""
    b, n, s, c = problem.queries.shape
    ours, target = make_candidates(problem)[OURS], target_of(problem.keys.device)

    def with_tile(tile: Schedule) -> Tensor:
        with override(cut(tile, target, b * n * s, 1, problem.keys.shape[2], c)):
            return ours()

    return {
        f"{OURS} {t.rows}x{t.keys} {t.num_warps}w {t.num_stages}s": partial(with_tile, t)
        for t in ALTERNATIVES.get(c, ())
    }


def _sdpa(problem: Problem, backend: SDPBackend) -> Attend:
    b, n, s, _ = problem.queries.shape

    def causal() -> Tensor:
        keys, values = (t.expand(b, n, -1, -1) for t in (problem.keys, problem.values))
        bias = causal_lower_right(s, keys.shape[2])
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(problem.queries, keys, values, bias, scale=problem.scale)

    def as_rows() -> Tensor:
        rows = rearrange(problem.queries, "b n s c -> 1 1 (b n s) c")
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(rows, problem.keys, problem.values, scale=problem.scale)
        return rearrange(out, "1 1 (b n s) c -> b n s c", b=b, n=n)

    return causal if problem.causal else as_rows


def _flex(problem: Problem) -> Attend:
    """Compiled anew for each problem; on a CPU, to try the benchmark, not at all."""
    b, n, s, _ = problem.queries.shape
    compiled = torch.compile(flex_attention, dynamic=False) if problem.keys.is_cuda else flex_attention
    mask = lower_right_mask(s, problem.keys.shape[2], problem.keys.device) if problem.causal else None

    def run() -> Tensor:
        if problem.causal:
            return compiled(
                problem.queries, problem.keys, problem.values, block_mask=mask, scale=problem.scale,
                enable_gqa=True,
            )  # fmt: skip
        rows = rearrange(problem.queries, "b n s c -> 1 1 (b n s) c")
        out = compiled(rows, problem.keys, problem.values, scale=problem.scale)
        return rearrange(out, "1 1 (b n s) c -> b n s c", b=b, n=n)

    return run


def lower_right_mask(s: int, l: int, device: torch.device) -> BlockMask:
    """Query i sees the keys j <= l - s + i; made block by block, where create_block_mask would hold (s l)."""
    first = l - s
    starts = torch.arange(0, s, FLEX_BLOCK, device=device, dtype=torch.int32)
    blocks = torch.arange(-(-l // FLEX_BLOCK), device=device, dtype=torch.int32)
    last = torch.clamp(starts + FLEX_BLOCK, max=s) - 1
    seen = (first + last) // FLEX_BLOCK + 1  # blocks of which the last query of a block sees something
    whole = (first + starts + 1) // FLEX_BLOCK  # blocks of which the first one sees all
    numbers = blocks.expand(len(starts), -1)
    partly = (whole[:, None] + numbers) % len(blocks)
    lists = [seen - whole, partly, whole, numbers]
    return BlockMask.from_kv_blocks(
        *(t.to(torch.int32).contiguous()[None, None] for t in lists),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda b, h, q, k: k <= q + first,
        seq_lengths=(s, l),
    )


@torch.no_grad()
def sampled_truth(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of some rows (m), their output in float64, and in float32 with rounded weights.

    The latter's weights, relative to the largest, have the cache's dtype, as in every fused attention.
    """
    rows = rearrange(problem.queries, "b n s c -> (b n s) c")
    places = torch.linspace(0, len(rows) - 1, min(SAMPLE, len(rows)), device=rows.device)
    chosen = places.round().long().unique()
    l, s = problem.keys.shape[2], problem.queries.shape[2]
    last = chosen % s + l - s if problem.causal else torch.full_like(chosen, l)
    truth = _streamed(problem, rows[chosen].double(), last, torch.float64)
    return chosen, truth, _streamed(problem, rows[chosen].float(), last, problem.keys.dtype)


def _streamed(problem: Problem, rows: Tensor, last: Tensor, weights_dtype: torch.dtype) -> Tensor:
    out, lse = torch.zeros_like(rows), torch.full_like(rows[:, :1], -torch.inf)
    for start in range(0, problem.keys.shape[2], STEP):
        keys, values = (t[0, 0, start : start + STEP].to(rows.dtype) for t in (problem.keys, problem.values))
        places = start + torch.arange(len(keys), device=rows.device)
        logits = (problem.scale * (rows @ keys.T)).masked_fill(places > last[:, None], -torch.inf)
        top = logits.amax(1, keepdim=True).clamp(min=-1e30)
        weights = (logits - top).exp()
        both = torch.logaddexp(lse, top + weights.sum(1, keepdim=True).log())
        here = weights.to(weights_dtype).to(rows.dtype) @ values
        out, lse = out * (lse - both).exp() + here * (top - both).exp(), both
    return out
