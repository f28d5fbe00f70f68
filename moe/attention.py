"""Grouped-query attention with rotary embedding: where tokens are, what they see, and what they take from it.

Axes: b batch, s new tokens, l all tokens so far (cached and new), d model width, n query heads, g key heads,
m places whose output is wanted, c channels of a head.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from moe.attend import attend
from moe.decoder_config import DecoderConfig
from moe.feed_forward import Projection
from moe.kv_cache import KVCache
from moe.places import At, select
from moe.rotary import Rotation
from moe.short_conv import ShortConv
from moe.sight import Sight


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
class Attended:
    """What a layer read, and with which queries and keys: a loss may look where it looked.

    out      (b m d) at the places asked for
    queries  (b n m c), scaled: a logit is their product with a key
    keys     (b g l c); in a fork, those of its own tokens
    """

    out: Tensor
    queries: Tensor
    keys: Tensor

    def narrowed(self, last: int) -> "Attended":
        """What the last so many of its places looked at."""
        queries = rearrange(select(rearrange(self.queries, "b n m c -> b m n c"), last), "b m n c -> b n m c")
        return replace(self, out=select(self.out, last), queries=queries)


class GroupedQueryAttention(nn.Module):
    """softmax(q k^T / sqrt(c)) v, where n / g query heads share each key head (2305.13245).

    With `use_qk_norm`, queries and keys are RMS-normalised before they are turned, each head by itself
    (Qwen3) or all at once (OLMoE). With `attention_sinks` each head has one more, learnt logit in its softmax
    (gpt-oss). With `use_ssmax`, in layers that see everything, the logits of a query that sees l keys are
    multiplied by s log(l), s learnt for each head (Scalable-Softmax, 2501.19399): as keys grow in number, the
    softmax stays as sharp. Layers outside `no_rope_layers` alone turn queries and keys by their place.
    Letters of the layer's `canon_set` put short convolutions on queries, keys and values, or on keys alone.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        n, g, c, d = config.num_attention_heads, config.kv_heads, config.head_size, config.hidden_size
        self.config, self.layer, self.head_size = config, layer, c
        self.window, self.is_rotary = config.window(layer), config.is_rotary(layer)
        self.scale = c**-0.5 if config.attention_multiplier is None else config.attention_multiplier
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
        self.q_conv, self.k_conv, self.v_conv = (
            short_conv(config, layer, letters, heads * c, name)
            for name, letters, heads in (("q", "B", n), ("k", "BK", g), ("v", "B", g))
        )
        self.ssmax = None
        if config.use_ssmax and self.window is None:  # begins as an ordinary layer at the trained length
            begin = math.log(config.max_position_embeddings) ** -config.ssmax_power
            self.ssmax = nn.Parameter(torch.full((n,), begin))
        if config.attention_init != "normal" and self.window is None:
            self._init_induction()
        if config.attention_init == "copying" and self.window is not None:
            self._init_copying(std)

    @torch.no_grad()
    def _init_induction(self) -> None:
        """Queries as keys, keys shifted by one token: a token looks for what followed its own likes.

        That is an induction head (2209.11895) before any training; everything stays learnable.
        """
        keys = rearrange(self.k_proj.weight, "(g c) d -> g c d", c=self.head_size)
        group = self.config.num_attention_heads // self.config.kv_heads
        self.q_proj.weight.copy_(repeat(keys, "g c d -> (g r c) d", r=group))
        assert self.k_conv is not None, "the config asks for a convolution on the keys"
        self.k_conv.shift_()

    @torch.no_grad()
    def _init_copying(self, std: float) -> None:
        """Outputs undo values, up to noise: a token receives what its heads look at, as it is, on average.

        So what a sliding layer picks is at once what the layers after it can look up.
        """
        n, g = self.config.num_attention_heads, self.config.kv_heads
        back = rearrange(self.v_proj.weight, "(g c) d -> g d c", g=g) / (n * self.head_size * std**2)
        self.o_proj.weight.copy_(repeat(back, "g d c -> d (g r c)", r=n // g))

    def forward(
        self,
        x: Tensor,
        sight: Sight,
        rotation: Rotation,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        at: At = None,
    ) -> Attended:
        """x (b s d), mask (b s) -> (b m d) at the places `at`; keys and values come from all of x."""
        if self.q_conv is None:
            queries = self.q_proj(select(x, at))
        else:
            queries = select(self.q_conv(self.q_proj(x), mask, cache), at)
        keys, values = self.k_proj(x), self.v_proj(x)
        if self.k_conv is not None:
            keys = self.k_conv(keys, mask, cache)
        if self.v_conv is not None:
            values = self.v_conv(values, mask, cache)
        queries, keys = self._heads(queries, self.q_norm), self._heads(keys, self.k_norm)
        values = self._heads(values, None)
        if self.is_rotary:
            queries, keys = rotation.narrowed(at)(queries), rotation(keys)
        sight = sight.narrowed(at)
        if self.ssmax is not None:
            queries = queries * self._ssmax(sight.positions, queries.dtype)
        shared = None
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values, window=self.window)
            shared = cache.shared(self.layer)
        out = attend(queries, keys, values, sight, scale=self.scale, sinks=self.sinks, shared=shared)
        out = self.o_proj(rearrange(out, "b n m c -> b m (n c)"))
        return Attended(out, queries * self.scale, keys)

    def _ssmax(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """s log(l)^p for the l keys that a query sees, (b n m 1); log 1 = 0, where there is no choice."""
        assert self.ssmax is not None
        logs = (positions + 1).to(at_least_fp32(dtype)).log() ** self.config.ssmax_power
        return einsum(self.ssmax.to(logs.dtype), logs, "n, b m -> b n m")[..., None].to(dtype)

    def _heads(self, x: Tensor, norm: "RMSNorm | None") -> Tensor:
        """Normalised, clamped and parted into heads: (b s (n c)) -> (b n s c)."""
        if norm is not None and self.config.qk_norm == "full":
            x = norm(x)
        if self.config.clip_qkv is not None:
            x = x.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        x = rearrange(x, "b s (n c) -> b n s c", c=self.head_size)
        return norm(x) if norm is not None and self.config.qk_norm == "head" else x


def short_conv(config: DecoderConfig, layer: int, letters: str, channels: int, name: str) -> ShortConv | None:
    """The convolution of a layer that has one of the letters in its `canon_set`."""
    if not set(letters) & set(config.canon_letters(layer)):
        return None
    return ShortConv(channels, config.canon_kernel, f"{layer}.{name}")


def residual_scale(config: DecoderConfig) -> float:
    """1 / sqrt(2 layers): a layer adds two terms to the residual stream, whose variance so stays (GPT-2)."""
    return (2 * config.num_hidden_layers) ** -0.5
