import torch
from moe.sight import reach
import torch.nn.functional as F
def windowed_attention(queries, keys, values, window, *, scale, sinks=None):
    from moe.attend import _attend_with_sinks
    allowed = reach(queries.shape[2], keys.shape[2], window, keys.device)[None, None]
    if sinks is not None:
        return _attend_with_sinks(queries, keys, values, allowed, False, scale, sinks)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, scale=scale, enable_gqa=queries.shape[1] != keys.shape[1])
