"""Multi-head latent attention: keys and values are computed from one short latent a token.

Source: DeepSeek-V2, 2405.04434, section 2.1. Axes as in moe.attention; r channels of the latent.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from moe.attend import attend
from moe.attention import Attended, RMSNorm, residual_scale
from moe.decoder_config import DecoderConfig
from moe.feed_forward import Projection
from moe.kv_cache import KVCache
from moe.places import At, select
from moe.rotary import Rotation, yarn_mscale
from moe.sight import Sight

LATENT_EPS = 1e-6  # of the norms of the latents, whatever rms_norm_eps is: DeepSeek's models have it so


class LatentAttention(nn.Module):
    """softmax(q k^T scale) v; the cache holds the normalised latent (r) and the turned key channels.

    The latent (r) and the channels that turn, which all heads share, come from `kv_a_proj_with_mqa`;
    `kv_b_proj` makes keys and values of each head from the latent. Queries
    likewise with `q_lora_rank`, else directly.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        n, d, rank = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        assert rank is not None, "the decoder builds it for configs with kv_lora_rank"
        self.layer, self.rank, self.window = layer, rank, config.window(layer)
        self.still, self.turning, self.value_size = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        std, bias, width = config.initializer_range, config.attention_bias, n * config.head_size
        self.q_proj = self.q_a_proj = self.q_a_layernorm = self.q_b_proj = None
        if config.q_lora_rank is None:
            self.q_proj = Projection(d, width, std=std)
        else:
            self.q_a_proj = Projection(d, config.q_lora_rank, std=std, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Projection(config.q_lora_rank, width, std=std)
        self.kv_a_proj_with_mqa = Projection(d, rank + self.turning, std=std, bias=bias)
        self.kv_a_layernorm = RMSNorm(rank, LATENT_EPS)
        self.kv_b_proj = Projection(rank, n * (self.still + self.value_size), std=std)
        output_std = std * residual_scale(config)
        self.o_proj = Projection(n * self.value_size, d, std=output_std, bias=config.attention_output_bias)
        self.scale = config.attention_multiplier or config.head_size**-0.5
        scaling = config.rope_scaling
        if scaling is not None and scaling.mscale_all_dim and scaling.factor is not None:
            self.scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2

    def forward(
        self,
        x: Tensor,
        sight: Sight,
        rotation: Rotation,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        at: At = None,
    ) -> Attended:
        """x (b s d) -> (b m d) at the places `at`; keys and values come from all of x."""
        still, turning = self._queries(select(x, at)).split([self.still, self.turning], dim=-1)
        queries = torch.cat([still, rotation.narrowed(at)(turning)], dim=-1)
        latent, shared = self.kv_a_proj_with_mqa(x).split([self.rank, self.turning], dim=-1)
        latent, shared = self.kv_a_layernorm(latent)[:, None], rotation(shared[:, None])
        if cache is not None:
            latent, shared = cache.append(self.layer, latent, shared, window=self.window)
            if (before := cache.shared(self.layer)) is not None:
                latent, shared = (
                    torch.cat([old.expand(len(new), -1, -1, -1), new], dim=2)
                    for old, new in zip(before, (latent, shared), strict=True)
                )
            latent, shared = latent.to(x.dtype), shared.to(x.dtype)
        width = self.still + self.value_size
        both = rearrange(self.kv_b_proj(latent), "b 1 l (n c) -> b n l c", c=width)
        still, values = both.split([self.still, self.value_size], dim=-1)
        keys = torch.cat([still, shared.expand(-1, still.shape[1], -1, -1)], dim=-1)
        out = attend(queries, keys, values, sight.narrowed(at), scale=self.scale)
        return Attended(self.o_proj(rearrange(out, "b n m c -> b m (n c)")), queries * self.scale, keys)

    def _queries(self, x: Tensor) -> Tensor:
        """(b s d) -> (b n s c)."""
        if self.q_proj is not None:
            queries = self.q_proj(x)
        else:
            assert self.q_a_proj and self.q_a_layernorm and self.q_b_proj
            queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return rearrange(queries, "b s (n c) -> b n s c", c=self.still + self.turning)
