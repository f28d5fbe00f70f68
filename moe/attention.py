"""Grouped-query attention with rotary embedding: where tokens are, what they see, and what they take from it.

Axes: b batch, s new tokens, l all tokens so far (cached and new), d model width, n query heads, g key heads,
c channels of a head.

One forward pass makes one `Sight` (where each token is, what it may see), which all layers share; a layer
with another reach is given another `Sight`.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from moe.decoder_config import DecoderConfig
from moe.feed_forward import Projection
from moe.kv_cache import KVCache, known
from moe.rotary import Rotation


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis, computed in fp32 or wider (1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (... width) -> (... width), same dtype."""
        wide = at_least_fp32(x.dtype)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself when it is at least as wide as fp32, else fp32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """Where the new tokens are and what they may see.

    positions  (b s) or (1 s) int64: a token's place among the real tokens of its row
    allowed    (b 1 s l) bool: which keys a query may see; None leaves it to `is_causal`
    is_causal  without `allowed`: a query sees the keys up to its own, or, when False, all of them
    """

    positions: Tensor
    allowed: Tensor | None
    is_causal: bool = False

    @classmethod
    def causal(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        mask: Tensor | None,
        cache: KVCache | None,
        window: int | None = None,
    ) -> Self:
        """Every real token sees itself and the real tokens before it, cached or new, within the window.

        `shape` is (b s); `mask` (b s) bool is True at real tokens, None when all are. A padding token also
        sees itself, so that no row of the softmax is empty; no real token sees a padding token. The window
        counts places, padding included, as Hugging Face does.
        """
        s = shape[1]
        past = 0 if cache is None else cache.length
        seen = None if cache is None else cache.seen
        window = None if window is None or window >= past + s else window
        if mask is None and seen is None:
            positions = torch.arange(past, past + s, device=device)[None]
            if past == 0 and window is None:
                return cls(positions, None, is_causal=True)
            if s == 1 and window is None:
                return cls(positions, None)
            return cls(positions, _reach(s, past + s, window, device)[None, None])
        real = known(mask, shape, device)
        before = known(seen, (shape[0], past), device)
        positions = (before.sum(1, keepdim=True) + real.cumsum(1) - 1).clamp(min=0)
        keys = rearrange(torch.cat([before, real], dim=1), "b l -> b 1 1 l")
        itself = torch.eye(s, dtype=torch.bool, device=device)
        itself = F.pad(itself, (past, 0))
        return cls(positions, keys & _reach(s, past + s, window, device) | itself)


def _reach(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(s l) bool: the last query sees all keys, or the last `window`; every earlier one a key less."""
    lower = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return lower if window is None else lower.triu(keys - queries - window + 1)


class GroupedQueryAttention(nn.Module):
    """softmax(q k^T / sqrt(c)) v, where n / g query heads share each key head (2305.13245).

    With `use_qk_norm`, queries and keys are RMS-normalised before they are turned, each head by itself
    (Qwen3) or all at once (OLMoE). With `attention_sinks` each head has one more, learnt logit in its softmax
    (gpt-oss).
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        n, g, c, d = config.num_attention_heads, config.kv_heads, config.head_size, config.hidden_size
        self.config, self.layer, self.head_size = config, layer, c
        std, bias = config.initializer_range, config.attention_bias
        self.q_proj = Projection(d, n * c, std=std, bias=bias)
        self.k_proj = Projection(d, g * c, std=std, bias=bias)
        self.v_proj = Projection(d, g * c, std=std, bias=bias)
        self.o_proj = Projection(
            n * c, d, std=std * residual_scale(config), bias=config.attention_output_bias
        )
        self.q_norm = self.k_norm = None
        if config.use_qk_norm:
            heads = (n, g) if config.qk_norm == "full" else (1, 1)
            self.q_norm, self.k_norm = (RMSNorm(h * c, config.rms_norm_eps) for h in heads)
        self.sinks = nn.Parameter(torch.zeros(n)) if config.attention_sinks else None

    def forward(self, x: Tensor, sight: Sight, rotation: Rotation, cache: KVCache | None = None) -> Tensor:
        """x (b s d) -> (b s d)."""
        queries = self._heads(self.q_proj(x), self.q_norm)
        keys = self._heads(self.k_proj(x), self.k_norm)
        values = self._heads(self.v_proj(x), None)
        queries, keys = rotation(queries), rotation(keys)
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)
        out = attend(queries, keys, values, sight, scale=self.config.attention_multiplier, sinks=self.sinks)
        return self.o_proj(rearrange(out, "b n s c -> b s (n c)"))

    def _heads(self, x: Tensor, norm: "RMSNorm | None") -> Tensor:
        """Normalised, clamped and parted into heads: (b s (n c)) -> (b n s c)."""
        if norm is not None and self.config.qk_norm == "full":
            x = norm(x)
        if self.config.clip_qkv is not None:
            x = x.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        x = rearrange(x, "b s (n c) -> b n s c", c=self.head_size)
        return norm(x) if norm is not None and self.config.qk_norm == "head" else x


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sight: Sight,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """queries (b n s c), keys (b g l c), values (b g l c') -> (b n s c').

    scale: of the products; None: 1 / sqrt(c). sinks (n): a logit of each head that joins its softmax.

    With a mask on CUDA the key heads are repeated: of the kernels that take a mask, only the one that
    writes all s * l weights to memory shares key heads.
    """
    if sinks is not None:
        return _attend_with_sinks(queries, keys, values, sight, scale, sinks)
    if sight.allowed is not None and keys.is_cuda:
        shared = queries.shape[1] // keys.shape[1]
        keys, values = (repeat(x, "b g l c -> b (g r) l c", r=shared) for x in (keys, values))
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=sight.allowed,
        is_causal=sight.is_causal,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def _attend_with_sinks(
    queries: Tensor, keys: Tensor, values: Tensor, sight: Sight, scale: float | None, sinks: Tensor
) -> Tensor:
    """With all s * l weights in memory: torch's fused attention knows no sink. Softmax in fp32 or wider."""
    g, (s, c), l = keys.shape[1], queries.shape[2:], keys.shape[2]
    queries = rearrange(queries, "b (g r) s c -> b g r s c", g=g)
    scores = einsum(queries * (scale or c**-0.5), keys, "b g r s c, b g l c -> b g r s l")
    scores = scores.to(at_least_fp32(scores.dtype))
    allowed = _reach(s, l, None, keys.device)[None, None] if sight.is_causal else sight.allowed
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, :, None], -torch.inf)
    sink = repeat(sinks.to(scores.dtype), "(g r) -> b g r s 1", g=g, b=len(scores), s=s)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1].to(values.dtype)
    return rearrange(einsum(weights, values, "b g r s l, b g l c -> b g r s c"), "b g r s c -> b (g r) s c")


def residual_scale(config: DecoderConfig) -> float:
    """1 / sqrt(2 layers): a layer adds two terms to the residual stream, whose variance so stays (GPT-2)."""
    return (2 * config.num_hidden_layers) ** -0.5
