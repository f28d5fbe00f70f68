import torch
from dataclasses import dataclass
@dataclass
class Partial:
    out: torch.Tensor
    lse: torch.Tensor
def streamed_attention(queries, keys, values, *, scale, first=None, block=2048):
    wide = torch.promote_types(queries.dtype, torch.float32)
    n, g = queries.shape[1], keys.shape[1]
    k = keys.to(wide).repeat_interleave(n // g, 1); v = values.to(wide).repeat_interleave(n // g, 1)
    s = (queries.to(wide) * scale) @ k.mT
    if first is not None:
        q = torch.arange(queries.shape[2])[:, None] + first
        s = s.masked_fill(torch.arange(keys.shape[2]) > q, -torch.inf)
    return Partial(s.softmax(-1) @ v, s.logsumexp(-1))
def merge(parts, sinks=None):
    lse = torch.stack([p.lse for p in parts])
    total = lse.logsumexp(0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks[:, None].expand_as(total).to(total))
    return sum(p.out * (p.lse - total).exp()[..., None] for p in parts)
