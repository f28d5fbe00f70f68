"""Exact attention to any number of keys, a run of them at a time, in memory that does not grow with them.

Axes: b batch, s queries, l keys, n query heads, g key heads, r = n / g, c channels. m caches: g, or b times
g; q rows: the queries that meet one cache; a run of keys is p blocks of k keys.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from moe.ops.choose import triton_obstacle

BLOCK = 4096  # with 64 channels in fp32, keys and values are 2 MiB, which the second cache of a core holds
MOST_BLOCKS = 32  # of a run: more make it no faster
MOST_CONVERTED = 4  # of a run whose keys are stored in 16 bits, so that their fp32 copies stay in a cache
MOST_ROWS = 16384  # of all blocks of a run together, so that their outputs stay small
MOST_SCORES = 2**24  # in memory at once, where no fused attention is at hand
LOWEST = -60.0
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_CHANNELS = 256

# What torch's attention calls on CPUs; it also returns the logarithm of the sum. It keeps the scores of a
# block in cache, shares the blocks among the threads once a call, and makes numbers below the normal ones 0.
# It must be given at least one key, and channels side by side: it checks neither.
_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """What queries take from some of their keys; `merge` makes the whole of such parts.

    out  (b n s c) mean of the values, weighted by the softmax over these keys; 0 where there are none
    lse  (b n s) logarithm of the sum of exp(score) over these keys; -inf where there are none
    """

    out: Tensor
    lse: Tensor


def merge(parts: Sequence[Partial], sinks: Tensor | None = None) -> Tensor:
    """Attention to all keys (b n s c), from parts of which no two share a key; exp(lse) weighs a part.

    sinks (n): one more logit of each head, without a value. A query that sees nothing gets 0.

    Raises:
        ValueError: no parts.
    """
    if not parts:
        raise ValueError("there are no parts to merge: pass at least one Partial.")
    whole = reduce(_join, parts)
    if sinks is None:
        return whole.out
    return whole.out * torch.sigmoid(whole.lse - sinks.to(whole.lse.dtype)[:, None])[..., None]


def streamed_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    first: int | None = None,
    block: int = BLOCK,
) -> Partial:
    """Attention without gradients that reads the keys once for all queries; in fp32, or float64 for float64.

    queries (b n s c); keys (b g l c) and values (b g l c'), or both of a batch of 1 that all rows share.
    first: query i sees the keys 0 to first + i, as far as they exist; None: every query sees all keys.
    block: keys that a thread takes at a time; one query is work for all threads if there are enough blocks.

    On a GPU with Triton `moe_triton.attention_over_cache` computes it, with queries in the dtype of the keys.

    Reference: moe.ops.reference.attention.

    Raises:
        ValueError: shapes that do not fit together, a block below 1, or gradients asked for.
    """
    _check(queries, keys, values, block)
    (b, n, s, _), (shared, g, l, width) = queries.shape, values.shape
    wide = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    blind = 0 if first is None else min(max(-first, 0), s)
    if blind:
        seeing = streamed_attention(queries[:, :, blind:], keys, values, scale=scale, first=0, block=block)
        return Partial(F.pad(seeing.out, (0, 0, blind, 0)), F.pad(seeing.lse, (blind, 0), value=-math.inf))
    if 0 in (b, n, s, l):
        out = queries.new_zeros(b, n, s, width, dtype=wide)
        return Partial(out, torch.full_like(out[..., 0], -math.inf))
    if _has_kernel(queries, keys, values, scale):
        import moe_triton  # pyright: ignore[reportMissingTypeStubs]

        return Partial(*moe_triton.attention_over_cache(queries, keys, values, scale, first))
    queries = rearrange(queries.to(wide) * scale, "(m x) (g r) s c -> (m g) (x r) s c", m=shared, g=g)
    common = l if first is None else min(first if s > 1 else first + 1, l)
    parts = _parts(queries.contiguous(), keys, values, common, block)
    whole = reduce(_join, parts)
    axes = {"m": shared, "g": g, "x": b // shared, "s": s}
    out = rearrange(whole.out, "(m g) (x r s) c -> (m x) (g r) s c", **axes)
    return Partial(out, rearrange(whole.lse, "(m g) (x r s) -> (m x) (g r) s", **axes))


def _has_kernel(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> bool:
    """Whether `moe_triton.attention_over_cache` takes these, on a device where Triton works."""
    if triton_obstacle(queries.device) is not None or keys.dtype not in KERNEL_DTYPES:
        return False
    fits = keys.shape == values.shape and keys.shape[-1] % 16 == 0 and keys.shape[-1] <= KERNEL_CHANNELS
    return fits and scale > 0 and queries.dtype in (keys.dtype, torch.float32)


def _parts(queries: Tensor, keys: Tensor, values: Tensor, common: int, block: int) -> Iterator[Partial]:
    """queries (m h s c), keys (x g l c), values (x g l c'), m = x g: out (m (h s) c'), lse (m (h s)).

    All queries see the first `common` keys; of the others, query i sees those up to common + i.
    """
    rows = rearrange(queries, "m h s c -> m (h s) c")
    most = MOST_BLOCKS if keys.dtype == rows.dtype else MOST_CONVERTED
    most = min(most, max(1, MOST_ROWS // rows[..., 0].numel()), -(-common // block))
    rooms = [_room(x, most * block, rows.dtype) for x in (keys, values)]
    start = 0
    while start < common:
        blocks = max(1, min(most, (common - start) // block))
        stop = start + blocks * min(block, common - start)
        run = (_into(room, x[:, :, start:stop]) for room, x in zip(rooms, (keys, values), strict=True))
        run = (rearrange(x, "x g (p k) c -> (x g) p k c", p=blocks) for x in run)
        yield _combine(_over_blocks(rows, *run))
        start = stop
    if common < keys.shape[2]:
        yield _over_triangle(queries, *(x[:, :, common : common + queries.shape[2]] for x in (keys, values)))


def _join(one: Partial, other: Partial) -> Partial:
    """The same queries over two sets of keys, as over their union."""
    return _combine(Partial(torch.stack([one.out, other.out]), torch.stack([one.lse, other.lse])))


def _combine(parts: Partial) -> Partial:
    """out (p ... c), lse (p ...) -> out (... c), lse (...)."""
    if len(parts.lse) == 1:
        return Partial(parts.out[0], parts.lse[0])
    lse = parts.lse.logsumexp(0)
    weights = (parts.lse - lse.masked_fill(lse == -math.inf, 0)).exp()
    return Partial(einsum(parts.out, weights, "p ... c, p ... -> ... c"), lse)


def _room(x: Tensor, keys: int, dtype: torch.dtype) -> Tensor | None:
    """Memory for so many keys of x in another dtype: the same for all runs, since new memory is slow."""
    return None if x.dtype == dtype else x.new_empty(x[:, :, 0].numel() * keys, dtype=dtype)


def _into(room: Tensor | None, x: Tensor) -> Tensor:
    """x (x g k c) in the dtype of its room."""
    return x if room is None else room[: x.numel()].view(x.shape).copy_(x)


def _over_blocks(rows: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """rows (m q c), keys (m p k c), values (m p k c') -> out (p m q c'), lse (p m q)."""
    if _has_fused(rows):
        out, lse = _by_fused(rows[:, None].expand(-1, keys.shape[1], -1, -1), keys, values)
    else:
        tiles = rows[:, None].split(max(1, MOST_SCORES // keys[..., 0].numel()), dim=2)
        tiles = [_by_matmul(tile, keys, values) for tile in tiles]
        out, lse = (torch.cat(x, dim=2) for x in zip(*tiles, strict=True))
    return Partial(out.transpose(0, 1), lse.transpose(0, 1))


def _over_triangle(queries: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """queries (m h s c), keys (x g k c), values (x g k c'), k <= s: out (m (h s) c'), lse (m (h s)).

    Query i sees the keys 0 to i.
    """
    keys, values = (rearrange(x, "x g k c -> (x g) 1 k c").to(queries.dtype) for x in (keys, values))
    if _has_fused(queries):
        out, lse = _by_fused(queries, keys, values, is_causal=True)
    else:
        m, h, s, _ = queries.shape
        size = max(1, MOST_SCORES // (m * h * s))
        place = torch.arange(s, device=queries.device)
        unseen = (place[: keys.shape[2]] > own[:, None] for own in place.split(size))
        tiles = zip(queries.split(size, dim=2), unseen, strict=True)
        tiles = [_by_matmul(own, keys, values, hidden) for own, hidden in tiles]
        out, lse = (torch.cat(x, dim=2) for x in zip(*tiles, strict=True))
    return Partial(rearrange(out, "m h s c -> m (h s) c"), rearrange(lse, "m h s -> m (h s)"))


def _has_fused(queries: Tensor) -> bool:
    return queries.device.type == "cpu" and _fused is not None


def _by_fused(
    queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """As `_by_matmul`; of keys and values the narrower ones are widened by zeros, which change nothing."""
    assert _fused is not None
    width, wanted = max(keys.shape[-1], values.shape[-1]), values.shape[-1]
    queries, keys, values = (_widened(x, width) for x in (queries, keys, values))
    out, lse = _fused(queries, keys, values, is_causal=is_causal, scale=1.0)
    return out[..., :wanted], lse


def _widened(x: Tensor, width: int) -> Tensor:
    x = x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_matmul(
    queries: Tensor, keys: Tensor, values: Tensor, unseen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """queries (... q c), keys (... k c), values (... k c'), unseen (q k) -> out (... q c'), lse (... q).

    score - highest score is raised to -60 before exp: below -87 exp takes a slow path on CPUs, and its
    results, denormal numbers, slow the product with the values. That moves a weight by less than e^-60 =
    9e-27 of the largest one, and all of 10^10 weights together by less than float64 rounds.
    """
    scores = queries @ keys.mT
    if unseen is not None:
        scores = scores.masked_fill_(unseen, -math.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).clamp_(min=LOWEST).exp_()
    if unseen is not None:
        weights = weights.masked_fill_(unseen, 0)
    total = weights.sum(-1, keepdim=True)
    return (weights @ values).div_(total), (highest + total.log())[..., 0]


def _check(queries: Tensor, keys: Tensor, values: Tensor, block: int) -> None:
    (b, n, _, c), (shared, g), width = queries.shape, keys.shape[:2], keys.shape[3]
    if shared not in (1, b) or values.shape[:3] != keys.shape[:3] or width != c:
        raise ValueError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} must "
            f"be (b n s c), (b g l c) and (b g l c'), with the batch of the queries or of 1 for the keys."
        )
    if g == 0 or n % g:
        raise ValueError(
            f"{n} query heads cannot share {g} key heads evenly. Make one a multiple of the other."
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, values)):
        raise ValueError(
            "streamed_attention has no gradients. Call it inside torch.no_grad(), or train with "
            "moe.attention.attend or moe.windowed_attention."
        )
    if block < 1:
        raise ValueError(f"block={block} must be at least 1 key. Leave it out for the measured one.")
