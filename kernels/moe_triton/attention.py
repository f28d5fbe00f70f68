"""Exact attention of new queries over a long cache of keys and values; forward only.

b sequences, s queries of each, l keys, n query heads, g key heads (n = g r), c channels of a head.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .attend import attend
from .attention_schedule import choose_schedule
from .checks import check_attention
from .launch import is_plain, target_of
from .merge_parts import merge_parts
from .tiles import can_describe, has_descriptors


def attention_over_cache(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, first: int | None = None
) -> tuple[Tensor, Tensor]:
    """queries (b n s c), keys and values (b g l c) or (1 g l c) -> out (b n s c), lse (b n s), in float32.

    Reference: moe.ops.reference.attention.

    out = softmax(scale q kᵀ) v and lse = log of the sum of exp(scale q kᵀ), in the order of one softmax over
    all keys whatever their number: results over several caches can be merged by their lse. Where there is no
    key to see, out is 0 and lse is -inf.

    keys, values: bfloat16, float16 or float32, in any strides: a view of a larger buffer is not copied, and
    what lies outside of it is not read. (1 g l c), or expanded from it: all sequences share them, and one
    reading serves all, as it serves the query heads that share a key head.
    queries: of the same dtype, or float32, and then rounded to it once.
    first: query i sees keys j <= first + i (with first = l - s the last one sees all); None: every key.

    Used by `moe.streamed_attention` on a GPU. It is no operation of a MoE layer, and has no gradients:
    training has no cache to answer over.

    float32 is multiplied in float32, also where torch's own products may use tf32, which would shift a logit
    of 90 by 0.05. The same inputs give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a scale that is not positive, channels
            that are no multiple of 16 up to 256.
        NotImplementedError: a gradient is asked for.
    """
    check_attention(queries, keys, values, scale)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (queries, keys, values)):
        raise NotImplementedError(
            "attention_over_cache has no gradients. Call it under torch.no_grad(), or train with "
            "torch.nn.functional.scaled_dot_product_attention."
        )
    if is_plain(queries, keys, values) and not is_in_torch_dispatch_mode():
        return in_parts(queries, keys, values, scale, first)
    return _attention_over_cache(queries, keys, values, scale, first)


def in_parts(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, first: int | None
) -> tuple[Tensor, Tensor]:
    """out (b n s c) and lse (b n s) in float32; query i of s sees keys 0 to first + i, or all of them.

    keys and values (1 g l c): all sequences share them.
    """
    b, n, s, c = queries.shape
    out = queries.new_empty(b, n, s, c, dtype=torch.float32)
    lse = queries.new_empty(b, n, s, dtype=torch.float32)
    seen = keys.shape[2] if first is None else max(0, min(keys.shape[2], first + s))
    if seen == 0 or lse.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    keys, values = keys[:, :, :seen], values[:, :, :seen]
    if b > 1 and keys.stride(0) == values.stride(0) == 0:  # expanded: one cache
        keys, values = keys[0][None], values[0][None]  # a stride of 0 would keep the accelerator away
    queries = queries.to(keys.dtype)
    first = None if first is None or first >= seen - 1 else first
    heads = keys.shape[0] * keys.shape[1]
    aligned = can_describe(keys) and can_describe(values)
    tma = aligned and keys.element_size() == 2 and has_descriptors(keys.device)
    target, rows = target_of(keys.device), b * n * s // heads
    schedule = choose_schedule(target, keys.dtype, rows, heads, seen, c, aligned=aligned)
    parts, step = schedule.splits, schedule.splits * schedule.pass_keys
    if seen <= schedule.pass_keys and parts == 1:
        attend(queries, keys, values, out, lse, scale, first, schedule, 0, seen, tma=tma)
        return out, lse
    part_out, part_lse = out.new_empty(parts, *out.shape), lse.new_empty(parts, *lse.shape)
    for start in range(0, seen, step):
        end = min(start + step, seen)
        attend(queries, keys, values, part_out, part_lse, scale, first, schedule, start, end, tma=tma)
        merge_parts(part_out, part_lse, out, lse, schedule.parts(end - start), add=start > 0)
    return out, lse


@torch.library.custom_op("moe_triton::attention_over_cache", mutates_args=())
def _attention_over_cache(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, first: int | None
) -> tuple[Tensor, Tensor]:
    return in_parts(queries, keys, values, scale, first)


@_attention_over_cache.register_fake
def _(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, first: int | None
) -> tuple[Tensor, Tensor]:
    out = queries.new_empty(queries.shape, dtype=torch.float32)
    return out, queries.new_empty(queries.shape[:3], dtype=torch.float32)
