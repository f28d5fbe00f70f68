"""Attention of every query to the `window` places that end at its own, with memory linear in the queries.

Axes: b batch, s queries, l keys, n query heads, g key heads, r = n / g, c channels, w window;
j blocks of m queries, each of which sees m + w - 1 keys.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

SMALLEST_BLOCK = 32  # smaller products cost more in calls than they save in products with unseen keys
LARGEST_BLOCK = 256
LARGEST_EXPLICIT_WINDOW = 128  # beyond it, the weights in memory cost more than to compute them twice


def windowed_attention(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, *, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """The query at place p sees the keys at places p - window + 1 to p, as far as they exist.

    queries (b n s c) stand at the last s of the l places of keys (b g l c) and values (b g l c'); sinks (n):
    a logit more for each head, without a value -> (b n s c'). Reference: moe.ops.reference.attention.

    Raises:
        ValueError: a window below 1, more queries than keys, or heads that do not share evenly.
    """
    _check(queries, keys, values, window)
    s = queries.shape[2]
    past = min(keys.shape[2] - s, window - 1)
    keys, values = (x[:, :, x.shape[2] - s - past :] for x in (keys, values))
    block = max(min(window, LARGEST_BLOCK), SMALLEST_BLOCK)
    if s <= block:
        return _attend(queries, keys, values, _band(s, s + past, window, queries), scale, sinks)
    if past == window - 1:
        return _in_blocks(queries, keys, values, window, block, scale, sinks)
    # Only the first queries lack a part of their window: they go by themselves.
    first = -(-(window - 1 - past) // block) * block
    if first >= s:
        return _attend(queries, keys, values, _band(s, s + past, window, queries), scale, sinks)
    begun = past + first
    early = _attend(
        queries[:, :, :first],
        keys[:, :, :begun],
        values[:, :, :begun],
        _band(first, begun, window, queries),
        scale,
        sinks,
    )
    start = begun - window + 1
    late = _in_blocks(
        queries[:, :, first:], keys[:, :, start:], values[:, :, start:], window, block, scale, sinks
    )
    return torch.cat([early, late], dim=2)


def _in_blocks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    block: int,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Every query has its whole window: l = s + w - 1. The blocks become a batch."""
    b, s = queries.shape[0], queries.shape[2]
    blocks = -(-s // block)
    queries = F.pad(queries, (0, 0, 0, blocks * block - s))
    queries = rearrange(queries, "b n (j m) c -> (b j) n m c", m=block)
    keys, values = (
        rearrange(_overlapping(x, block, blocks, window), "b g j k c -> (b j) g k c") for x in (keys, values)
    )
    band = _band(block, block + window - 1, window, queries)
    out = _attend(queries, keys, values, band, scale, sinks)
    return rearrange(out, "(b j) n m c -> b n (j m) c", b=b)[:, :, :s]


def _overlapping(x: Tensor, block: int, blocks: int, window: int) -> Tensor:
    """(b g l c) -> (b g j m+w-1 c): each block and the w - 1 places before it.

    By concatenation: the gradient of torch.unfold scatters, and is slower.
    """
    more = -(-(window - 1) // block)
    x = F.pad(x, (0, 0, 0, (blocks + more) * block - x.shape[2]))
    x = rearrange(x, "b g (j m) c -> b g j m c", m=block)
    parts = [x[:, :, i : i + blocks] for i in range(more + 1)]
    parts[-1] = parts[-1][:, :, :, : window - 1 - (more - 1) * block]
    return torch.cat(parts, dim=3)


def _band(queries: int, keys: int, window: int, like: Tensor) -> Tensor:
    """(s l) of 0 where the query sees the key and -inf elsewhere; the last query stands at the last key."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
    seen = seen.tril(keys - queries).triu(keys - queries - window + 1)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(~seen, -torch.inf)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, band: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """queries (b n s c), keys (b g l c), values (b g l c'), band (s l) -> (b n s c')."""
    g, r = keys.shape[1], queries.shape[1] // keys.shape[1]
    queries = rearrange(queries, "b (g r) s c -> b g (r s) c", g=g)
    band = repeat(band, "s l -> (r s) l", r=r)
    scores = einsum(queries * scale, keys, "b g s c, b g l c -> b g s l") + band
    if sinks is None:
        out = scores.softmax(-1) @ values
    else:
        share = torch.sigmoid(
            scores.logsumexp(-1, keepdim=True)
            - repeat(sinks, "(g r) -> g (r s) 1", g=g, s=band.shape[0] // r)
        )
        out = (scores.softmax(-1) @ values) * share
    return rearrange(out, "b g (r s) c -> b (g r) s c", r=r)


def _check(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> None:
    (_, n, s, _), (_, g, l, _) = queries.shape, keys.shape
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: a query sees its own place.")
    if s > l or values.shape[2] != l:
        raise ValueError(
            f"{s} queries, {l} keys and {values.shape[2]} values: the queries must be the last places of the "
            f"keys, and every key must have a value. Pass the cached keys and the new ones."
        )
    if n % g:
        raise ValueError(
            f"{n} query heads cannot share {g} key heads evenly. Make one a multiple of the other."
        )
