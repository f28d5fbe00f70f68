"""Rotary embedding (2104.09864), and the ways in which its frequencies are stretched over longer contexts.

Axes: b batch, s tokens, c channels that turn, in c/2 pairs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from moe.places import At, select

PRECISE_FROM = 65_536

RopeType = Literal["linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How a model was carried beyond the context it was first trained on; keys and values of Hugging Face.

    linear    every frequency divided by `factor`
    dynamic   NTK-aware: theta grows with the sequence once it is longer than `max_position_embeddings`
    yarn      high frequencies stay, low ones are divided by `factor`, a ramp between them (2309.00071)
    llama3    the same with a ramp over wavelengths (Llama 3.1)
    longrope  a factor for each pair: `long_factor` beyond the first context, else `short_factor` (2402.13753)

    factor None: max_position_embeddings / original_max_position_embeddings (yarn, longrope).
    original_max_position_embeddings None: max_position_embeddings.
    attention_factor multiplies cosine and sine; None: what the paper of yarn or longrope derives from factor.
    mscale, mscale_all_dim: DeepSeek's two parts of that factor.

    Raises:
        ValueError: an unknown `rope_type`, or one whose own keys are missing.
    """

    rope_type: RopeType
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in get_args(RopeType):
            raise ValueError(f"rope_type={self.rope_type!r} must be one of {list(get_args(RopeType))}.")
        if self.rope_type in ("linear", "dynamic", "llama3") and self.factor is None:
            raise ValueError(f'rope_type="{self.rope_type}" needs a factor, such as 2.0.')
        if self.factor is not None and self.factor < 1:
            raise ValueError(f"factor={self.factor} must be at least 1: contexts are stretched.")
        if self.rope_type == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError('rope_type="longrope" needs short_factor and long_factor, one number a pair.')
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}: the ramp runs from one to the other."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from plain data.

        Raises:
            ValueError: an unknown key, or values that are refused.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(data.keys() - set(known)):
            raise ValueError(f"rope_scaling has no key {unknown[0]!r}. Known: {', '.join(known)}.")
        if "rope_type" not in data:
            raise ValueError("rope_scaling needs a rope_type.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Cosine and sine (b s c/2) of the angles that turn each pair of channels.

    Pair i turns by position * theta^(-2i/c). It is channels i and i + c/2 (Hugging Face's convention) or,
    `interleaved`, channels 2i and 2i + 1 (DeepSeek, ERNIE). Channels beyond the first c stay as they are.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @classmethod
    def at(
        cls,
        positions: Tensor,
        channels: int,
        theta: float,
        dtype: torch.dtype = torch.float32,
        *,
        scaling: RopeScaling | None = None,
        max_position_embeddings: int = 0,
        interleaved: bool = False,
        reach: int = 0,
    ) -> Self:
        """The rotation at int64 positions (b s). Angles in fp32 or wider; no table, so no limit.

        reach: no position is larger. Beyond 65,536 angles are computed in fp64 (on devices that have it): in
        fp32 they would be off by 0.004 at 65,536 and by half a turn at 10 million.
        """
        narrow = wide = torch.promote_types(dtype, torch.float32)
        if reach > PRECISE_FROM and positions.device.type != "mps":
            wide = torch.float64
        exponents = torch.arange(0, channels, 2, device=positions.device).to(wide) / channels
        if scaling is None:
            frequencies, attention_factor = 1 / theta**exponents, 1.0
        else:
            length = positions.max() + 1 if positions.numel() else positions.new_ones(())
            frequencies, attention_factor = scaled_frequencies(
                scaling, exponents, theta, length, max_position_embeddings
            )
        angles = positions[..., None].to(wide) * frequencies
        cos, sin = (x.to(narrow) * attention_factor for x in (angles.cos(), angles.sin()))
        return cls(cos, sin, interleaved)

    def narrowed(self, at: At) -> "Rotation":
        """The rotation at some of the places."""
        return self if at is None else replace(self, cos=select(self.cos, at), sin=select(self.sin, at))

    def __call__(self, x: Tensor) -> Tensor:
        """Turn x (b n s c), or wider; same dtype."""
        cos, sin = self.cos[:, None], self.sin[:, None]
        turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
        turned = turned.to(cos.dtype)
        if self.interleaved:
            left, right = turned[..., 0::2], turned[..., 1::2]
            pairs = torch.stack([left * cos - right * sin, right * cos + left * sin], dim=-1).flatten(-2)
        else:
            left, right = turned.chunk(2, dim=-1)
            pairs = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
        return torch.cat([pairs.to(x.dtype), rest], dim=-1) if rest.shape[-1] else pairs.to(x.dtype)


def scaled_frequencies(
    scaling: RopeScaling, exponents: Tensor, theta: float, length: Tensor, max_position_embeddings: int
) -> tuple[Tensor, float]:
    """Frequencies (c/2) for a sequence of `length` tokens, and the factor of cosine and sine.

    exponents (c/2) are 2i/c; length is a scalar on the device, and compared there: no host sync.
    """
    first = scaling.original_max_position_embeddings or max_position_embeddings
    factor = scaling.factor or max_position_embeddings / first
    plain = 1 / theta**exponents
    if scaling.rope_type == "linear":
        return plain / factor, 1.0
    if scaling.rope_type == "dynamic":
        channels = 2 * exponents.shape[0]
        longer = length.clamp(min=max_position_embeddings).to(exponents.dtype) / max_position_embeddings
        growth = (factor * longer - (factor - 1)) ** (channels / (channels - 2))
        return 1 / (theta * growth) ** exponents, 1.0
    if scaling.rope_type == "longrope":
        short, long = (
            plain / torch.tensor(factors, dtype=plain.dtype, device=plain.device)
            for factors in (scaling.short_factor, scaling.long_factor)
        )
        return torch.where(length > first, long, short), _longrope_attention(scaling, factor, first)
    if scaling.rope_type == "llama3":
        return _llama3(scaling, plain, factor, first), 1.0
    return _yarn(scaling, plain, theta, factor, first), _yarn_attention(scaling, factor)


def _llama3(scaling: RopeScaling, plain: Tensor, factor: float, first: int) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = first * plain / (2 * math.pi)  # in the first context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / factor + kept * plain


def _yarn(scaling: RopeScaling, plain: Tensor, theta: float, factor: float, first: int) -> Tensor:
    channels = 2 * plain.shape[0]

    def pair_that_turns(times: float) -> float:
        """The number of the pair that turns so many times in the first context."""
        return channels * math.log(first / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    high += 0.001 if low == high else 0  # a step instead of a ramp
    pairs = torch.arange(plain.shape[0], device=plain.device).to(plain.dtype)
    divided = ((pairs - low) / (high - low)).clamp(0, 1)
    return plain / factor * divided + plain * (1 - divided)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1: yarn's temperature of the attention (2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn_attention(scaling: RopeScaling, factor: float) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(factor, scaling.mscale) / yarn_mscale(factor, scaling.mscale_all_dim)
    return yarn_mscale(factor)


def _longrope_attention(scaling: RopeScaling, factor: float, first: int) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 else 1.0
