"""Exact attention of new queries over a long cache of keys and values; forward only.

b sequences, s queries of each, l keys, n query heads, g key heads (n = g r), c channels of a head.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .attend import attend
from .checks import check_attention
from .launch import is_plain


def attention_over_cache(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, first: int | None = None
) -> tuple[Tensor, Tensor]:
    """queries (b n s c), keys and values (b g l c) or (1 g l c) -> out (b n s c), lse (b n s), in float32.

    out = softmax(scale q kᵀ) v and lse = log of the sum of exp(scale q kᵀ), in the order of one softmax over
    all keys whatever their number: results over several caches can be merged by their lse. Where there is no
    key to see, out is 0 and lse is -inf.

    keys, values: bfloat16, float16 or float32, in any strides: a view of a larger buffer is not copied, and
    what lies outside of it is not read. (1 g l c), or expanded from it: all sequences share them, and one
    reading serves all, as it serves the query heads that share a key head.
    queries: of the same dtype, or float32, and then rounded to it once.
    first: query i sees keys j <= first + i (with first = l - s the last one sees all); None: every key.

    Used by `moe.streamed_attention` on a GPU. It is no operation of a MoE layer, and has no gradients: training
    has no cache to answer over.

    float32 is multiplied in float32, also where torch's own products may use tf32, which would shift a logit
    of 90 by 0.05. The same inputs give the same bits.

    Raises:
        ValueError: shapes, dtypes, devices or a scale that do not fit together, or over 256 channels.
        NotImplementedError: a gradient is asked for.
    """
    check_attention(queries, keys, values, scale)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (queries, keys, values)):
        raise NotImplementedError(
            "attention_over_cache has no gradients. Call it under torch.no_grad(), or train with "
            "torch.nn.functional.scaled_dot_product_attention."
        )
    if is_plain(queries, keys, values) and not is_in_torch_dispatch_mode():
        return attend(queries, keys, values, scale, first)
    return _attention_over_cache(queries, keys, values, scale, first)


@torch.library.custom_op("moe_triton::attention_over_cache", mutates_args=())
def _attention_over_cache(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, first: int | None
) -> tuple[Tensor, Tensor]:
    return attend(queries, keys, values, scale, first)


@_attention_over_cache.register_fake
def _(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, first: int | None
) -> tuple[Tensor, Tensor]:
    out = queries.new_empty(queries.shape, dtype=torch.float32)
    return out, queries.new_empty(queries.shape[:3], dtype=torch.float32)
