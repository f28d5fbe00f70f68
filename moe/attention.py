"""Grouped-query attention with rotary embedding, and the cache that decoding reads.

Axes: b batch, s new tokens, l all tokens so far (cached and new), d model width, n query heads, g key heads,
c channels of a head.

One forward pass makes one `Sight` (where each token is, what it may see), which all layers share; a layer
with another reach is given another `Sight`.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from moe.config import DecoderConfig
from moe.feed_forward import Projection


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
        cls, shape: tuple[int, int], device: torch.device, mask: Tensor | None, cache: "KVCache | None"
    ) -> Self:
        """Every real token sees itself and the real tokens before it, cached or new.

        `shape` is (b s); `mask` (b s) bool is True at real tokens, None when all are. A padding token also
        sees itself, so that no row of the softmax is empty; no real token sees a padding token.
        """
        s = shape[1]
        past = 0 if cache is None else cache.length
        seen = None if cache is None else cache.seen
        if mask is None and seen is None:
            positions = torch.arange(past, past + s, device=device)[None]
            if past == 0:
                return cls(positions, None, is_causal=True)
            if s == 1:
                return cls(positions, None)
            return cls(positions, _lower_triangle(s, past + s, device)[None, None])
        real = _known(mask, shape, device)
        before = _known(seen, (shape[0], past), device)
        positions = (before.sum(1, keepdim=True) + real.cumsum(1) - 1).clamp(min=0)
        keys = rearrange(torch.cat([before, real], dim=1), "b l -> b 1 1 l")
        itself = torch.eye(s, dtype=torch.bool, device=device)
        itself = F.pad(itself, (past, 0))
        return cls(positions, keys & _lower_triangle(s, past + s, device) | itself)


def _known(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask


def _lower_triangle(queries: int, keys: int, device: torch.device) -> Tensor:
    """(s l) bool: the last query sees all keys, the one before it all but one, and so on."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Rotary embedding (2104.09864): cosine and sine (b s c/2) of the angles that turn each pair of channels.

    Pair i is channels i and i + c/2 (Hugging Face's convention) and turns by position * theta^(-2i/c).
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, channels: int, theta: float, dtype: torch.dtype = torch.float32) -> Self:
        """The rotation at int64 positions (b s). Angles in fp32 or wider; no table, so no limit."""
        wide = at_least_fp32(dtype)
        exponents = torch.arange(0, channels, 2, device=positions.device).to(wide) / channels
        angles = positions[..., None].to(wide) / theta**exponents
        return cls(angles.cos(), angles.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """Turn x (b n s c); same dtype."""
        cos, sin = self.cos[:, None], self.sin[:, None]
        left, right = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


class KVCache:
    """The keys and values of the tokens so far, for every layer; buffers double when they are full.

    length  tokens held, padding included
    seen    (b length) bool, True at real tokens; None while every token is real

    Each layer calls `append` in turn, then the decoder `advance`, once: a forward pass that fails half-way
    leaves the cache as it was.
    """

    def __init__(self, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1.")
        self.capacity = capacity
        self.length = 0
        self.seen: Tensor | None = None
        self._layers: list[Tensor] = []  # each (2 b g capacity c)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (b g s c) of a layer; returns all so far, (b g l c).

        Raises:
            ValueError: another batch size, model, dtype or device than the tokens held; or gradients asked.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise ValueError(
                "a KVCache keeps no gradients. Decode inside torch.no_grad(), or pass cache=None."
            )
        new = torch.stack([keys, values])
        end = self.length + keys.shape[2]
        buffer = self._room(layer, new, end)
        buffer[:, :, :, self.length : end] = new
        return buffer[0, :, :, :end], buffer[1, :, :, :end]

    def advance(self, tokens: int, mask: Tensor | None) -> None:
        """Count the tokens that every layer has now stored; `mask` (b tokens) is True at real ones."""
        if mask is not None or self.seen is not None:
            batch, device = self._layers[0].shape[1], self._layers[0].device
            before = _known(self.seen, (batch, self.length), device)
            self.seen = torch.cat([before, _known(mask, (batch, tokens), device)], dim=1)
        self.length += tokens

    def _room(self, layer: int, new: Tensor, end: int) -> Tensor:
        """The buffer of a layer, with room for `end` tokens."""
        if layer == len(self._layers) and self.length == 0:
            self._layers.append(_empty(new, max(self.capacity, end)))
        if layer >= len(self._layers):
            raise ValueError(
                f"this cache was filled by a model of {len(self._layers)} layers. Use a new KVCache."
            )
        buffer = self._layers[layer]
        if self.length == 0 and _kind(buffer) != _kind(new):  # left by a forward pass that failed
            self._layers[layer] = buffer = _empty(new, max(self.capacity, end))
        if (held := _kind(buffer)) != (given := _kind(new)):
            raise ValueError(
                f"this cache holds (batch, key heads, channels, dtype, device) = {held}, got {given}. "
                f"Use a new KVCache for another batch or model."
            )
        if end > buffer.shape[3]:
            grown = _empty(new, max(end, 2 * buffer.shape[3]))
            grown[:, :, :, : self.length] = buffer[:, :, :, : self.length]
            self._layers[layer] = buffer = grown
        return buffer


def _empty(new: Tensor, capacity: int) -> Tensor:
    two, b, g, _, c = new.shape
    return new.new_empty(two, b, g, capacity, c)


def _kind(buffer: Tensor) -> tuple[int, int, int, str, str]:
    _, b, g, _, c = buffer.shape
    return b, g, c, str(buffer.dtype), str(buffer.device)


class GroupedQueryAttention(nn.Module):
    """softmax(q k^T / sqrt(c)) v, where n / g query heads share each key head (2305.13245).

    With `use_qk_norm`, queries and keys are RMS-normalised per head before they are turned (Qwen3).
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        n, g, c, d = config.num_attention_heads, config.kv_heads, config.head_size, config.hidden_size
        self.layer, self.head_size = layer, c
        std = config.initializer_range
        self.q_proj = Projection(d, n * c, std=std)
        self.k_proj = Projection(d, g * c, std=std)
        self.v_proj = Projection(d, g * c, std=std)
        self.o_proj = Projection(n * c, d, std=std * residual_scale(config))
        self.q_norm = RMSNorm(c, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(c, config.rms_norm_eps) if config.use_qk_norm else None

    def forward(self, x: Tensor, sight: Sight, rotation: Rotation, cache: KVCache | None = None) -> Tensor:
        """x (b s d) -> (b s d)."""
        queries, keys, values = (
            rearrange(projection(x), "b s (n c) -> b n s c", c=self.head_size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = rotation(queries), rotation(keys)
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)
        return self.o_proj(rearrange(attend(queries, keys, values, sight), "b n s c -> b s (n c)"))


def attend(queries: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Tensor:
    """queries (b n s c), keys and values (b g l c) -> (b n s c).

    With a mask on CUDA the key heads are repeated: of the kernels that take a mask, only the one that
    writes all s * l weights to memory shares key heads.
    """
    if sight.allowed is not None and keys.is_cuda:
        shared = queries.shape[1] // keys.shape[1]
        keys, values = (repeat(x, "b g l c -> b (g r) l c", r=shared) for x in (keys, values))
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=sight.allowed,
        is_causal=sight.is_causal,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def residual_scale(config: DecoderConfig) -> float:
    """1 / sqrt(2 layers): a layer adds two terms to the residual stream, whose variance so stays (GPT-2)."""
    return (2 * config.num_hidden_layers) ** -0.5
