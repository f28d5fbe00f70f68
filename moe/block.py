"""One layer of a decoder: attention, then a dense or MoE feed-forward.

Pre-norm (2002.04745): x + attention(norm(x)), then x + feed-forward(norm(x)). Axes as in moe.decoder; m
places whose output is wanted.
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from moe.attention import Attended, GroupedQueryAttention, RMSNorm, residual_scale, short_conv
from moe.decoder_config import DecoderConfig
from moe.feed_forward import SwiGLU
from moe.kv_cache import KVCache
from moe.latent_attention import LatentAttention
from moe.layer import MoE
from moe.ops.choose import Backend
from moe.places import At, select
from moe.plan import RoutingPlan
from moe.rotary import Rotation
from moe.routing import Routing
from moe.sight import Sight


@dataclass(frozen=True, slots=True, eq=False)
class BlockOutput:
    """What one layer computed: x (b m d); routing and plan of a MoE feed-forward; what attention read."""

    x: Tensor
    routing: Routing | None
    plan: RoutingPlan | None
    attended: Attended


class Block(nn.Module):
    """One layer: attention, then a dense or MoE feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_conv = short_conv(config, layer, "A", config.hidden_size, "input")
        self.self_attn = (
            GroupedQueryAttention(config, layer)
            if config.kv_lora_rank is None
            else LatentAttention(config, layer)
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_conv = short_conv(config, layer, "C", config.hidden_size, "post_attention")
        self.mlp = (
            MoE(config, backend=backend, output_scale=residual_scale(config))
            if config.is_moe_layer(layer)
            else _dense_mlp(config)
        )
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self,
        x: Tensor,
        sight: Sight,
        rotation: Rotation,
        mask: Tensor | None,
        cache: KVCache | None,
        at: At = None,
    ) -> BlockOutput:
        """x (b s d) -> x (b m d) at the places `at`; keys and values come from all of x."""
        wanted = at
        if self.post_attention_conv is not None and at is not None:
            at = self._with_halo(at, x.shape[1], may_end_early=mask is not None and cache is not None)
        normed = self.input_layernorm(x)
        if self.input_conv is not None:
            normed = self.input_conv(normed, mask, cache)
        attended = self.self_attn(normed, sight, rotation, mask, cache, at)
        x, mask = self._add(select(x, at), attended.out), None if mask is None else select(mask, at)
        normed = self.post_attention_layernorm(x)
        if self.post_attention_conv is not None:
            normed = self.post_attention_conv(normed, mask, cache)
            if isinstance(wanted, int):
                x, normed = select(x, wanted), select(normed, wanted)
                mask = None if mask is None else select(mask, wanted)
                attended = attended.narrowed(wanted)
        if isinstance(self.mlp, SwiGLU):
            return BlockOutput(self._add(x, self.mlp(normed)), None, None, attended)
        output = self.mlp(normed, mask)
        return BlockOutput(self._add(x, output.y), output.routing, output.plan, attended)

    def _with_halo(self, at: At, s: int, *, may_end_early: bool) -> int:
        """The last places that the convolution behind attention reads for the last `at`.

        All of them where rows `may_end_early`: a cache keeps the last real tokens, wherever they stand.
        """
        if not isinstance(at, int):
            raise ValueError(
                "at: the last layer has a convolution before its feed-forward (C in canon_set), which reads "
                "neighbours; give a number of last places."
            )
        assert self.post_attention_conv is not None
        return s if may_end_early else min(s, at + len(self.post_attention_conv.weight) - 1)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.residual_multiplier == 1 else x + self.residual_multiplier * y


def _dense_mlp(config: DecoderConfig) -> SwiGLU:
    width = cast(int, config.intermediate_size)  # DecoderConfig refuses a dense layer without it
    std = config.initializer_range
    output_std = std * residual_scale(config)
    return SwiGLU(config.hidden_size, width, std=std, output_std=output_std, bias=config.mlp_bias)
