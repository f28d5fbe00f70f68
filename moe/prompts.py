"""What a decoder is given to continue: ids of text, or tokens of several senses.

Axes: b sequences, s tokens, d model width, f features of a token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from moe.backbone import Hidden
from moe.kv_cache import KVCache
from moe.modality_sequence import Interleaved, ModalityBatch
from moe.places import At

if TYPE_CHECKING:
    from moe.decoder import Decoder

Prompt = Tensor | Interleaved | ModalityBatch  # ids (b s), a sequence, or a batch padded at the left


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Tokens on the decoder's device; without modality (b s) and features (b s f) all are text.

    ids (b s) int64; mask (b s) bool, True at real tokens, or None where all are.
    """

    ids: Tensor
    modality: Tensor | None = None
    features: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, prompt: Prompt, mask: Tensor | None, device: torch.device) -> "Prompts":
        """A prompt of any kind; only ids may come with a mask, and they stay where they are.

        Raises:
            ValueError: a mask beside a sequence, or beside a batch, which has its own.
        """
        if isinstance(prompt, Tensor):
            return cls(prompt, mask=mask)
        if mask is not None:
            raise ValueError(f"a {type(prompt).__name__} takes no mask: it says itself what is padding.")
        if isinstance(prompt, Interleaved):
            return cls(*(rearrange(x, "s ... -> 1 s ...").to(device) for x in prompt.dense()))
        batch = prompt.to(device)
        return cls(*batch.inputs, mask=batch.padding)

    def hidden(self, decoder: "Decoder", cache: KVCache, at: At) -> Hidden:
        """What the decoder makes of them, as `Decoder.hidden`."""
        if self.modality is None:
            return decoder.hidden(self.ids, mask=self.mask, cache=cache, at=at)
        x = decoder.embed(self.ids, self.modality, self.features)
        return decoder.hidden(inputs_embeds=x, mask=self.mask, cache=cache, at=at)
