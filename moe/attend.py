"""Softmax attention of queries over keys and values: the fastest exact way for what each query may see.

Axes as in moe.attention. Reference: moe.ops.reference.attention.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from moe.sight import Sight, reach
from moe.streamed_attention import merge, streamed_attention
from moe.windowed_attention import windowed_attention

PARTS = 4
MASK_BYTES = 1 << 22  # the largest mask (s l) that is made; beyond it keys are read in blocks


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sight: Sight,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    shared: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """queries (b n s c), keys (b g l c), values (b g l c') -> (b n s c'), in the dtype of the queries.

    scale: of the products; None: 1 / sqrt(c). sinks (n): a logit of each head that joins its softmax.
    shared: keys and values (1 g l' c) before all others, which every row of the batch sees whole; they are
    read once for all of them. Keys and values may be kept in fewer bits than the queries have.

    With a mask on CUDA the key heads are repeated: of the kernels that take a mask, only the one that
    writes all s * l weights to memory shares key heads.
    """
    scale = float(queries.shape[-1] ** -0.5) if scale is None else scale
    s, l = queries.shape[2], keys.shape[2]
    if s == 0:  # a prompt that is only read, up to the keys and values of the last layer
        return queries.new_empty(*queries.shape[:3], values.shape[3])
    if shared is not None:
        return _attend_forked(queries, keys, values, sight, scale, sinks, shared)
    if sight.allowed is None and sight.window is not None and l > sight.window:
        return windowed_attention(queries, keys, values, sight.window, scale=scale, sinks=sinks)
    if sight.allowed is None and _is_long(queries, keys, values):
        part = streamed_attention(queries, keys, values, scale=scale, first=l - s)
        return merge([part], sinks).to(queries.dtype)
    keys, values = keys.to(queries.dtype), values.to(queries.dtype)
    allowed = sight.allowed
    is_causal = False
    if allowed is None and s == l:  # a branch, so that a compiled graph has a bool
        is_causal = True
    if allowed is None and 1 < s < l:
        allowed = reach(s, l, None, keys.device)[None, None]
    if sinks is not None:
        return _attend_with_sinks(queries, keys, values, allowed, is_causal, scale, sinks)
    if sight.places is not None and keys.device.type == "cpu" and not torch.compiler.is_compiling():
        return _attend_in_parts(queries, keys, values, sight, scale)
    if allowed is not None and keys.is_cuda:
        group = queries.shape[1] // keys.shape[1]
        keys, values = (repeat(x, "b g l c -> b (g r) l c", r=group) for x in (keys, values))
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=allowed,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def _attend_in_parts(queries: Tensor, keys: Tensor, values: Tensor, sight: Sight, scale: float) -> Tensor:
    """Queries at rising places, a few at a time, each part with the keys up to its last place alone.

    torch's attention on a CPU computes what a mask hides: this saves a third of it, and of its gradient.
    """
    assert sight.places is not None and sight.allowed is not None
    outs = []
    for part, allowed, places in zip(
        queries.chunk(PARTS, dim=2),
        sight.allowed.chunk(PARTS, dim=2),
        sight.places.chunk(PARTS, dim=1),
        strict=True,
    ):
        seen = int(places.max()) + 1
        outs.append(
            F.scaled_dot_product_attention(
                part,
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=allowed[..., :seen],
                scale=scale,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
        )
    return torch.cat(outs, dim=2)


def _is_long(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether keys are read in blocks: no gradients, and a cache in few bits, or else a large mask."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, values)):
        return False
    s, l = queries.shape[2], keys.shape[2]
    return keys.dtype != queries.dtype or (s < l and s * l > MASK_BYTES)


def _attend_forked(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sight: Sight,
    scale: float,
    sinks: Tensor | None,
    shared: tuple[Tensor, ...],
) -> Tensor:
    """The softmax over what all rows share and over what each row has of its own, merged."""
    if sight.allowed is not None:
        raise ValueError("rows of a forked cache take no padding: ask prompts of one length at a time.")
    own = keys.shape[2] - queries.shape[2]
    parts = [
        streamed_attention(queries, *shared, scale=scale),
        streamed_attention(queries, keys, values, scale=scale, first=own),
    ]
    return merge(parts, sinks).to(queries.dtype)


def _attend_with_sinks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    allowed: Tensor | None,
    is_causal: bool,
    scale: float,
    sinks: Tensor,
) -> Tensor:
    """With all s * l weights in memory: torch's fused attention knows no sink. Softmax in fp32 or wider."""
    g, s, l = keys.shape[1], queries.shape[2], keys.shape[2]
    queries = rearrange(queries, "b (g r) s c -> b g r s c", g=g)
    scores = einsum(queries * scale, keys, "b g r s c, b g l c -> b g r s l")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if is_causal:
        allowed = reach(s, l, None, keys.device)[None, None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, :, None], -torch.inf)
    sink = repeat(sinks.to(scores.dtype), "(g r) -> b g r s 1", g=g, b=len(scores), s=s)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1].to(values.dtype)
    return rearrange(einsum(weights, values, "b g r s l, b g l c -> b g r s c"), "b g r s c -> b (g r) s c")
