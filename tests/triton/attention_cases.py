"""Problems of attention over a cache, and their answers by definition.

b sequences, s queries, l keys, n query heads, g key heads, c channels.
"""

from dataclasses import dataclass

import torch
from device import DEVICE, INTERPRETED
from einops import repeat
from helpers import assert_as_accurate
from torch import Tensor

Answer = tuple[Tensor, Tensor]  # out (b n s c), lse (b n s)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a problem; caches is 1 where all sequences share one, else b. first: see the operation."""

    b: int = 2
    s: int = 5
    l: int = 53
    n: int = 2
    g: int = 1
    c: int = 16
    caches: int = 1
    first: int | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    first: int | None

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, float, int | None]:
        return self.queries, self.keys, self.values, self.scale, self.first


def make_attention(
    sizes: Sizes, dtype: torch.dtype = torch.float32, *, largest: float = 5.0, spare: int = 9, seed: int = 0
) -> Problem:
    """Random queries and a cache that is part of a larger buffer, whose rest holds NaN.

    largest: about the largest logit.
    """
    z, generator = sizes, torch.Generator(DEVICE).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)

    def cache() -> Tensor:
        buffer = torch.full((z.caches, z.g, z.l + spare, z.c), torch.nan, device=DEVICE, dtype=dtype)
        buffer[:, :, : z.l] = randn(z.caches, z.g, z.l, z.c)
        return buffer[:, :, : z.l]

    return Problem(randn(z.b, z.n, z.s, z.c), cache(), cache(), largest / (4 * z.c**0.5), z.first)


def defined(problem: Problem, dtype: torch.dtype, weights_dtype: torch.dtype) -> Answer:
    """The definition, with all logits in memory; weights relative to the largest are rounded to a dtype."""
    queries, keys, values = (t.to(dtype) for t in (problem.queries, problem.keys, problem.values))
    b, n, s, _ = queries.shape
    keys, values = (
        repeat(t.expand(b, -1, -1, -1), "b g l c -> b (g r) l c", r=n // t.shape[1]) for t in (keys, values)
    )
    logits = problem.scale * (queries @ keys.mT)
    if problem.first is not None:
        places, last = torch.arange(keys.shape[2]), problem.first + torch.arange(s)
        logits = logits.masked_fill((places > last[:, None]).to(logits.device), -torch.inf)
    if keys.shape[2] == 0:
        return torch.zeros_like(queries), torch.full_like(queries[..., 0], -torch.inf)
    base = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = (logits - base).exp()
    total = weights.sum(-1)
    out = (weights.to(weights_dtype).to(dtype) @ values) / total.where(total > 0, 1)[..., None]
    return out, base[..., 0].where(total > 0, 0) + total.log()


def assert_answered(ours: Answer, problem: Problem) -> None:
    """As accurate as the definition in float32, whose weights are rounded to the cache's dtype.

    The last bit of a logit of 90, or of the lse by which parts are merged, is 90 bits of a weight. Rows that
    see nothing are exact. bfloat16 has more room in the interpreter, which cuts off where others round.
    """
    truth = defined(problem, torch.float64, torch.float64)
    fused = defined(problem, torch.float32, problem.keys.dtype)
    nothing = truth[1] == -torch.inf
    cut = INTERPRETED and problem.keys.dtype == torch.bfloat16
    ulps = 16 + truth[1][~nothing].abs().amax().item()
    for name, our, their, true in zip(("out", "lse"), ours, fused, truth, strict=True):
        assert our.dtype == torch.float32, name
        assert torch.equal(our[nothing].double(), true[nothing]), f"{name} of rows that see nothing"
        seen = [t[~nothing] for t in (our, their, true)]
        assert_as_accurate(*seen, factor=8 if cut else 2, ulps=ulps, name=name)
