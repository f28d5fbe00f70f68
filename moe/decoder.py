"""Decoder: a transformer whose feed-forward layers are dense or sparse Mixtures of Experts.

Modules are named as in Hugging Face's models.

Axes: b batch, s sequence, t = b * s tokens, d model width, v vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe.backbone import Backbone, Hidden
from moe.checkpoint import (
    MAX_SHARD_BYTES,
    atomic_folder,
    check_tensors,
    is_foreign,
    keep_other_files,
    load_config,
    readable_folder,
    save_config,
    save_tensors,
)
from moe.cross_entropy import IGNORED, linear_cross_entropy
from moe.decoder_config import DecoderConfig
from moe.decoder_inputs import check_embeds, check_ids, check_mask, words
from moe.decoder_loss import DecoderLoss, add_router_losses
from moe.feed_forward import Projection
from moe.generate import Options, generate
from moe.kv_cache import KVCache
from moe.modality_embedder import check_modality_inputs
from moe.ops.choose import Backend
from moe.places import At, check_places
from moe.plan import RoutingPlan
from moe.prompts import Prompt
from moe.routing import Routing
from moe.tensor_files import TensorReader, list_tensors

if TYPE_CHECKING:
    from moe.hf.checkpoint import Origin
    from moe.hf.tensor_names import Layout

NEEDS_MODALITIES = "Make it with DecoderConfig(modalities=ModalityConfig(...))."


@dataclass(frozen=True, slots=True, eq=False)
class DecoderOutput:
    """What a forward pass computed; `routings` and `plans` have one entry a MoE layer (`Decoder.moe_layers`).

    logits  (b s v)
    hidden  (b s d) after the final norm
    """

    logits: Tensor
    hidden: Tensor
    routings: tuple[Routing, ...]
    plans: tuple[RoutingPlan, ...]


class Decoder(nn.Module):
    """A decoder-only language model.

    | parameter                              | drawn from                                              |
    |----------------------------------------|---------------------------------------------------------|
    | embed_tokens                           | N(0, embedding_initializer_range²)                      |
    | lm_head (when untied)                  | N(0, initializer_range²)                                |
    | q_proj, k_proj, v_proj, router         | N(0, initializer_range²)                                |
    | gate_proj, up_proj, gate_up_proj       | N(0, initializer_range²)                                |
    | o_proj, down_proj (dense, each expert) | N(0, initializer_range² / (2 num_hidden_layers))        |
    | norms                                  | 1                                                       |
    | biases                                 | 0                                                       |
    | short convolutions                     | N(0, 0.1²) beside the residual                          |
    | ssmax                                  | 1 / log(max_position_embeddings)^ssmax_power            |
    | vector of each modality                | N(0, (0.1 embedding_initializer_range)²)                |
    | image_proj (of patches of n numbers)   | N(0, 3 embedding_initializer_range² / n)                |
    | audio_proj (of frames of n numbers)    | N(0, embedding_initializer_range² / n)                  |

    0.02 and the smaller output projections are GPT-2's (Radford et al. 2019, section 2.3), in the form of
    Megatron-LM (1909.08053). An expert is drawn exactly as a dense layer is. The embedders of modalities
    are scaled so that a patch or an audio frame begins as long as the embedding of a token.

    `checkpoint_blocks` (an attribute, too) keeps only the input of each layer for the backward pass and
    computes the rest again, with the same routing: the random state is restored for it.
    """

    def __init__(
        self, config: DecoderConfig, *, backend: Backend = "auto", checkpoint_blocks: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = checkpoint_blocks
        self.origin: Origin | None = None  # the Hugging Face folder that it was read from
        self.model = Backbone(config, backend=backend)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Projection(config.hidden_size, config.vocab_size, std=config.initializer_range)
        )

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (v d): the embedding itself when `tie_word_embeddings`."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layer number of each entry of `routings`."""
        return tuple(filter(self.config.is_moe_layer, range(self.config.num_hidden_layers)))

    def embed(self, ids: Tensor, modality: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """What the layers read, (b s d): the `inputs_embeds` of the other methods.

        ids (b s) int64, read where the modality is text. modality (b s) int64, of `Modality`, and features
        (b s f), finite: a patch or an audio frame for each other token, as `moe.modalities.collate` makes
        them. Without these two every token is text, and `hidden(ids)` is `hidden(inputs_embeds=embed(ids))`.

        Raises:
            ValueError: a wrong shape or dtype, a number out of range, features that are not finite (inside
                torch.compile values are not looked at), or a decoder without modalities that is given one.
        """
        check_ids(ids, self.config.vocab_size)
        if self.config.modalities is not None:
            check_modality_inputs(self.config.modalities, ids, modality, features)
        elif modality is not None or features is not None:
            raise ValueError(f"this decoder reads text alone. {NEEDS_MODALITIES}")
        return self.model.embed(ids, modality, features)

    def forward(
        self,
        ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> DecoderOutput:
        """Logits of the next token at every place.

        ids (b s) int64, or inputs_embeds (b s d) of `embed`; mask (b s) bool, True at real tokens: padding
        may stand left or right, and positions count real tokens. With a cache, ids continue what it holds,
        and mask covers ids alone.

        Raises:
            ValueError: a wrong shape or dtype, both or none of ids and inputs_embeds, or an id outside the
                vocabulary (inside torch.compile this last is not checked).
        """
        hidden = self.hidden(ids, inputs_embeds=inputs_embeds, mask=mask, cache=cache)
        return DecoderOutput(self.logits(hidden.states), hidden.states, hidden.routings, hidden.plans)

    def hidden(
        self,
        ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        at: At = None,
    ) -> Hidden:
        """As `forward`, without the logits, and for some places only if asked.

        at: a number m for the last m places, or places (b m) int64. The last layer then computes keys and
        values for all tokens, and all else for these places alone: less work, the same states. A cache is
        filled as by a whole pass; with 0 places that is all that is done.
        """
        inputs = self._inputs(ids, inputs_embeds)
        shape = (inputs.shape[0], inputs.shape[1])
        check_mask(mask, shape)
        check_places(at, shape)
        if isinstance(at, Tensor) and cache is not None:
            raise ValueError("at: with a cache, give a number of last places, not a tensor of them.")
        recompute = self.checkpoint_blocks and torch.is_grad_enabled() and cache is None
        return self.model(inputs, mask, cache, at, checkpoint_blocks=recompute)

    def _inputs(self, ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The one of the two that is given, checked."""
        if (ids is None) == (inputs_embeds is None):
            given = "both" if inputs_embeds is not None else "neither"
            raise ValueError(f"give ids or inputs_embeds, got {given}.")
        if ids is not None:
            check_ids(ids, self.config.vocab_size)
            return ids
        x = cast("Tensor", inputs_embeds)
        check_embeds(x, self.config.hidden_size)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (... d) -> (... v)."""
        return F.linear(self._scaled(hidden), self.head_weight)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """hidden / logits_scaling, which is to say the logits divided by it."""
        return hidden if self.config.logits_scaling == 1 else hidden / self.config.logits_scaling

    def loss(
        self,
        ids: Tensor | None,
        targets: Tensor,
        *,
        inputs_embeds: Tensor | None = None,
        mask: Tensor | None = None,
        chunk_tokens: int | None = None,
    ) -> DecoderLoss:
        """Cross-entropy with targets (b s), and the auxiliary losses of the routers.

        ids (b s), or None and inputs_embeds (b s d). A target of -100 or under padding is ignored; when all
        are, cross_entropy is 0 and so is its gradient.
        Logits exist for `chunk_tokens` tokens at a time (None: as many as make 64 MiB in fp32).

        Raises:
            ValueError: as `forward`, and for a target that is neither an id nor -100.
        """
        inputs = self._inputs(ids, inputs_embeds)
        shape = (inputs.shape[0], inputs.shape[1])
        if targets.shape != shape:
            raise ValueError(f"targets {words(targets.shape)} must have the shape of ids {words(shape)}.")
        check_mask(mask, shape)
        targets = targets if mask is None else targets.where(mask, IGNORED)
        check_ids(targets.where(targets != IGNORED, 0), self.config.vocab_size, "target")
        hidden = self.hidden(ids, inputs_embeds=inputs_embeds, mask=mask)
        cross_entropy = self.cross_entropy(hidden.states, targets, chunk_tokens=chunk_tokens)
        return self.with_router_losses(cross_entropy, cross_entropy, hidden, len(inputs))

    def cross_entropy(self, states: Tensor, targets: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
        """Mean nats of the targets (b m) after states (b m d); -100 is not counted."""
        return linear_cross_entropy(
            rearrange(self._scaled(states), "b m d -> (b m) d"),
            self.head_weight,
            rearrange(targets, "b m -> (b m)"),
            chunk_tokens=chunk_tokens,
        )

    def with_router_losses(
        self, cross_entropy: Tensor, objective: Tensor, hidden: Hidden, sequences: int
    ) -> DecoderLoss:
        """The losses of a batch whose objective, without those of the routers, is `objective`."""
        return add_router_losses(self.config, cross_entropy, objective, hidden, sequences)

    def generate(self, ids: Prompt, **options: Unpack[Options]) -> Tensor:
        """Prompt and continuation, (b s + new tokens); see `moe.generate.generate`."""
        return generate(self, ids, **options)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        layout: "Layout | None" = None,
        max_shard_bytes: float = MAX_SHARD_BYTES,
    ) -> None:
        """Write config and weights; the folder is the old one or the new one at any moment (moe/atomic.py).

        Tied weights are stored once. Other files in the folder (a tokenizer) stay.

        layout  None: as the decoder was read, to the byte, or in a layout of our own when it was made here.
                "hub": as transformers writes the architecture, "packed": as transformers holds it in memory,
                with all experts of a layer in one tensor; of the architecture that the decoder was read from,
                or of one that computes the same. Weights that were stored in 4 bits are written in 16.

        Raises:
            ValueError: the folder holds subfolders, or no architecture computes what this decoder does.
            OSError: no space left on disk, or another failure of the file system; the old folder is intact.
        """
        if layout is not None or self.origin is not None:
            from moe.hf.checkpoint import save_decoder

            save_decoder(folder, self, layout=layout, max_shard_bytes=max_shard_bytes)
            return
        with atomic_folder(folder) as temporary:
            keep_other_files(folder, temporary)
            save_config(temporary, self.config)
            save_tensors(temporary, self.state_dict(), max_shard_bytes=max_shard_bytes)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        backend: Backend = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Decoder":
        """Read what `save_pretrained` wrote, or a Hugging Face folder, in evaluation mode.

        `dtype` None keeps the stored ones. Experts of a Hugging Face folder are read one by one into place,
        in any layout, so that memory is little more than the model's; `moe.hf.families` lists the families.

        Raises:
            FileNotFoundError: no config or no weights.
            ValueError: a config that is not known here, a damaged file, tensors that do not fit the config.
        """
        if is_foreign(folder):
            from moe.hf.checkpoint import load_decoder

            return load_decoder(folder, backend=backend, dtype=dtype, device=device)
        with torch.device("meta"):
            decoder = cls(load_config(folder), backend=backend)
        stored = list_tensors(readable_folder(folder))
        check_tensors(stored, decoder.state_dict(), folder)
        with TensorReader() as reader:
            tensors = {name: reader.load(tensor).to(device or "cpu") for name, tensor in stored.items()}
        decoder.load_state_dict(tensors, assign=True)
        return decoder.to(dtype).eval() if dtype else decoder.eval()
