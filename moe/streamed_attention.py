"""Exact attention to any number of keys, block by block, in memory that does not grow with them.

Axes: b batch, s queries, l keys, n query heads, g key heads, r = n / g, c channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

LOWEST = -60.0  # of score - maximum, before exp


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """What queries take from some of their keys; `merge` makes the whole of such parts.

    out  (b n s c) the mean of the values by the softmax over these keys; 0 where there are none
    lse  (b n s) the logarithm of the sum of exp(score); -inf where there are none
    """

    out: Tensor
    lse: Tensor


def merge(parts: Sequence[Partial], sinks: Tensor | None = None) -> Tensor:
    """The attention to all keys (b n s c), from the parts for disjoint sets of them.

    sinks (n): one more logit of each head, without a value. Exact: the output of a part counts with
    exp(lse) out of the sum of all exp(lse). A query that sees nothing at all gets 0.
    """
    if not parts:
        raise ValueError("no parts to merge: pass at least one Partial.")
    lse = torch.stack([part.lse for part in parts])
    whole = lse
    if sinks is not None:
        sink = sinks.to(lse.dtype)[:, None].expand(lse.shape[1:])
        whole = torch.cat([lse, sink[None]])
    top = whole.amax(0)
    top = top.masked_fill(top == -math.inf, 0)
    weights = (lse - top).exp() / (whole - top).exp().sum(0).clamp(min=torch.finfo(lse.dtype).tiny)
    return (weights[..., None] * torch.stack([part.out for part in parts])).sum(0)


@torch.no_grad()
def streamed_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    first: int | None = None,
    block: int = 2048,
) -> Partial:
    """Attention without gradients, reading the keys and values once.

    queries (b n s c); keys (b g l c) and values (b g l c'), or with a batch of 1, shared by all b rows.
    first: query i sees the keys 0 to first + i (a chunk of a causal prefill); None: every query sees all.
    """
    b, n, s, _ = queries.shape
    shared, g = keys.shape[:2]
    wide = torch.promote_types(queries.dtype, torch.float32)
    out = queries.new_empty(b, n, s, values.shape[3], dtype=wide)
    lse = queries.new_empty(b, n, s, dtype=wide)
    for row in range(shared):
        here = slice(None) if shared == 1 else slice(row, row + 1)
        for head in range(g):
            heads = slice(head * n // g, (head + 1) * n // g)
            own = queries[here, heads]
            rows = rearrange(own, "b r s c -> (b r s) c").to(wide) * scale
            last = None
            if first is not None:
                last = torch.arange(first, first + s, device=queries.device).expand(own.shape[:3]).flatten()
            o, e = _stream(rows, keys[row, head], values[row, head], last, first, s, block)
            out[here, heads] = o.view(*own.shape[:3], -1)
            lse[here, heads] = e.view(own.shape[:3])
    return Partial(out, lse)


def _stream(
    rows: Tensor, keys: Tensor, values: Tensor, last: Tensor | None, first: int | None, s: int, block: int
) -> tuple[Tensor, Tensor]:
    """rows (q c), already scaled, keys (l c), values (l c'), last (q) the last key each row sees."""
    wide, q = rows.dtype, rows.shape[0]
    end = keys.shape[0] if first is None else min(keys.shape[0], max(first + s, 0))
    scores = rows.new_empty(q * min(block, max(end, 1)))
    out = rows.new_zeros(q, values.shape[1])
    total = rows.new_zeros(q, 1)
    top = rows.new_full((q, 1), torch.finfo(wide).min)
    for start in range(0, end, block):
        k, v = (x[start : min(start + block, end)].to(wide) for x in (keys, values))
        z = scores[: q * len(k)].view(q, len(k))
        torch.mm(rows, k.T, out=z)
        if first is not None and last is not None and start + len(k) - 1 > first:
            place = torch.arange(start, start + len(k), device=rows.device)
            unseen = place > last[:, None]
            z.masked_fill_(unseen, -math.inf)
        else:
            unseen = None
        new = torch.maximum(top, z.amax(1, keepdim=True))
        z.sub_(new)
        if wide == torch.float32:
            z.clamp_(min=LOWEST)
        z.exp_()
        if unseen is not None:
            z.masked_fill_(unseen, 0)
        shrink = (top - new).exp_()
        total.mul_(shrink).add_(z.sum(1, keepdim=True))
        out.mul_(shrink).addmm_(z, v)
        top = new
    is_empty = total == 0
    out.div_(total.masked_fill(is_empty, 1))
    lse = (top + total.log()).masked_fill_(is_empty, -math.inf)
    return out, lse[:, 0]
