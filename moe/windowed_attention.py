"""Attention of every query to the `window` places that end at its own, in memory linear in the queries.

Axes: b batch, s queries, l keys, n query heads, g key heads, r = n / g, c channels, w window; j blocks of m
queries, each with its m + w - 1 = k keys.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

SMALLEST_BLOCK = 32  # fewer queries cost more calls than they save products with keys that they do not see
LARGEST_BLOCK = 128
LARGEST_COPIED = 512  # window: from here on, copies of keys for each block cost more than a loop over blocks


def windowed_attention(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, *, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """The query at place p sees the keys at the places p - window + 1 to p, as far as they exist.

    queries (b n s c) stand at the last s places of keys (b g l c) and values (b g l c') -> (b n s c').
    sinks (n): one more logit of each head, without a value.

    Reference: moe.ops.reference.attention.

    Raises:
        ValueError: a window below 1, more queries than keys, or heads that do not share evenly.
    """
    _check(queries, keys, values, window)
    s = queries.shape[2]
    past = min(keys.shape[2] - s, window - 1)
    keys, values = (x[:, :, x.shape[2] - s - past :] for x in (keys, values))
    window = min(window, past + s) if s else 1
    block = min(max(window, SMALLEST_BLOCK), LARGEST_BLOCK)
    if s <= block:
        return _attend(queries, keys, values, _band(s, s + past, window, queries), scale, sinks)
    if window <= LARGEST_COPIED:
        return _in_one_batch(queries, keys, values, window, block, scale, sinks)
    return _one_by_one(queries, keys, values, window, window // 2, scale, sinks)


def _in_one_batch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    block: int,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Blocks become rows of the batch, each with copies of its keys; places that do not exist are hidden."""
    b, s = queries.shape[0], queries.shape[2]
    blocks = -(-s // block)
    missing = window - 1 - (keys.shape[2] - s)
    queries = rearrange(_padded(queries, 0, blocks * block), "b n (j m) c -> (b j) n m c", m=block)
    copied = (_overlapping(x, missing, block, blocks, window) for x in (keys, values))
    keys, values = (rearrange(x, "b g j k c -> (b j) g k c") for x in copied)
    band = _band(block, block + window - 1, window, queries)
    if missing:
        places = block * torch.arange(blocks, device=band.device)[:, None]
        places = places + torch.arange(band.shape[1], device=band.device)
        band = band.masked_fill((places < missing)[:, None], -torch.inf)
        band = repeat(band, "j m k -> (b j) m k", b=b)
    out = _attend(queries, keys, values, band, scale, sinks)
    return rearrange(out, "(b j) n m c -> b n (j m) c", j=blocks)[:, :, :s]


def _one_by_one(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    block: int,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """One block after the other, on views of its keys."""
    s = queries.shape[2]
    past = keys.shape[2] - s
    outs = []
    for start in range(0, s, block):
        own = queries[:, :, start : start + block]
        end = past + start + own.shape[2]
        begin = max(0, past + start - window + 1)
        band = _band(own.shape[2], end - begin, window, queries)
        outs.append(_attend(own, keys[:, :, begin:end], values[:, :, begin:end], band, scale, sinks))
    return torch.cat(outs, dim=2)


def _overlapping(x: Tensor, missing: int, block: int, blocks: int, window: int) -> Tensor:
    """(b g l c) -> (b g j k c): each block and the w - 1 places before it.

    By concatenation: the gradient of torch.unfold adds number by number.
    """
    more = -(-(window - 1) // block)
    x = rearrange(_padded(x, missing, (blocks + more) * block), "b g (j m) c -> b g j m c", m=block)
    parts = [x[:, :, i : i + blocks] for i in range(more + 1)]
    if more:
        parts[-1] = parts[-1][:, :, :, : window - 1 - (more - 1) * block]
    return torch.cat(parts, dim=3)


def _padded(x: Tensor, before: int, length: int) -> Tensor:
    """(b g l c) -> (b g length c), with `before` zeros at the front and the others at the end."""
    return x if x.shape[2] == length else F.pad(x, (0, 0, before, length - before - x.shape[2]))


def _band(queries: int, keys: int, window: int, like: Tensor) -> Tensor:
    """(m k) of 0 where the query sees the key and -inf elsewhere; the last query stands at the last key."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
    seen = seen.tril(keys - queries).triu(keys - queries - window + 1)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(~seen, -torch.inf)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, band: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """queries (b n m c), keys (b g k c), values (b g k c'), band (m k) or (b m k) -> (b n m c').

    The heads that share keys become rows of one product. A sink is one more key of zeros, whose place in the
    band holds its logit.
    """
    g, r, m = keys.shape[1], queries.shape[1] // keys.shape[1], queries.shape[2]
    band = repeat(band if band.ndim == 3 else band[None], "b m k -> b 1 (r m) k", r=r)
    if sinks is not None:
        keys, values = (F.pad(x, (0, 0, 0, 1)) for x in (keys, values))
        sink = repeat(sinks.to(band.dtype), "(g r) -> b g (r m) 1", g=g, b=len(band), m=m)
        band = torch.cat([band.expand(-1, g, -1, -1), sink], dim=-1)
    queries = rearrange(queries, "b (g r) m c -> b g (r m) c", g=g)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=band, scale=scale)
    return rearrange(out, "b g (r m) c -> b (g r) m c", r=r)


def _check(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> None:
    (n, s), (g, l) = queries.shape[1:3], keys.shape[1:3]
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: a query sees its own place.")
    if s > l or values.shape[2] != l:
        raise ValueError(
            f"{s} queries, {l} keys and {values.shape[2]} values: the queries must be the last places of the "
            f"keys, and every key must have a value. Pass the cached keys and the new ones."
        )
    if g == 0 or n % g:
        raise ValueError(f"{n} query heads cannot share {g} key heads evenly: n must be a multiple of g.")
