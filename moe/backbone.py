"""Everything of a decoder below its head: embedding, layers, final norm. Axes as in moe.decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.attention import Attended, RMSNorm
from moe.block import Block, BlockOutput
from moe.decoder_config import DecoderConfig
from moe.kv_cache import KVCache
from moe.modality_embedder import ModalityEmbedder
from moe.ops.choose import Backend
from moe.places import At
from moe.plan import RoutingPlan
from moe.rotary import Rotation
from moe.routing import Routing
from moe.sight import Sight


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """What the layers computed.

    states           (b m d) after the final norm, at the places asked for
    routings, plans  of each MoE layer; of a last layer that computed some places only, of those
    attended         what the last layer looked at, and with what
    """

    states: Tensor
    routings: tuple[Routing, ...]
    plans: tuple[RoutingPlan, ...]
    attended: Attended


class TokenEmbedding(nn.Embedding):
    """A table (v d) drawn once from N(0, std²)."""

    def __init__(self, vocab_size: int, width: int, *, std: float) -> None:
        self.std = std  # reset_parameters, which nn.Embedding calls, reads it
        super().__init__(vocab_size, width)

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.weight, std=self.std)


class Backbone(nn.Module):
    """Embedding, layers and final norm: everything below the head."""

    def __init__(self, config: DecoderConfig, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, std=config.embedding_std)
        self.layers = nn.ModuleList(
            Block(config, layer, backend=backend) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embed_modalities = (
            None
            if config.modalities is None
            else ModalityEmbedder(config.modalities, config.hidden_size, std=config.embedding_std)
        )

    def embed(self, ids: Tensor, modality: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """ids (b s), and with modalities modality (b s), features (b s f) -> what the layers read (b s d)."""
        x = self.embed_tokens(ids)
        if self.embed_modalities is not None:
            x = self.embed_modalities(x, modality, features)
        return x if self.config.embedding_multiplier == 1 else x * self.config.embedding_multiplier

    def forward(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        at: At = None,
        *,
        checkpoint_blocks: bool = False,
    ) -> Hidden:
        """Hidden at the places `at` of inputs, which are ids (b s) of text, or embeddings (b s d).

        mask (b s); the cache, if any, is extended by s tokens.
        """
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        if cache is not None:
            cache.begin()
        windows = [self.config.window(layer) for layer in range(len(self.layers))]
        shape = (x.shape[0], x.shape[1])
        sights = {window: Sight.causal(shape, x.device, mask, cache, window) for window in set(windows)}
        reach = shape[1] + (0 if cache is None else cache.length)
        rotation = self._rotation(sights[windows[0]].positions, x.dtype, reach)
        outputs: list[BlockOutput] = []
        for layer, (block, window) in enumerate(zip(self.layers, windows, strict=True)):
            places = at if layer == len(windows) - 1 else None
            arguments = (x, sights[window], rotation, mask, cache, places)
            if checkpoint_blocks:
                output = checkpoint(block, *arguments, use_reentrant=False)
            else:
                output = block(*arguments)
            x = output.x
            outputs.append(output)
        if cache is not None:
            cache.advance(shape[1], mask)
        return Hidden(
            self.norm(x),
            tuple(output.routing for output in outputs if output.routing is not None),
            tuple(output.plan for output in outputs if output.plan is not None),
            outputs[-1].attended,
        )

    def _rotation(self, positions: Tensor, dtype: torch.dtype, reach: int) -> Rotation:
        config = self.config
        return Rotation.at(
            positions,
            config.rotary_size,
            config.rope_theta,
            dtype,
            scaling=config.rope_scaling,
            max_position_embeddings=config.max_position_embeddings,
            interleaved=config.rope_interleave,
            reach=reach,
        )
