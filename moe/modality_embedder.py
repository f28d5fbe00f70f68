"""One embedding for tokens of every sense.

    text          row of the token table       + vector of text
    image, video  W_image . patch              + vector of image, or of video
    audio         W_audio . log-mel frame      + vector of audio

Images and video frames share W_image: what a picture shows is the same in both, and the vector tells them
apart. The linear patch embedding is ViT's (2010.11929), without places: those are the decoder's own.

Axes: b sequences, s tokens, d model width, f features of a token.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from moe.feed_forward import Projection
from moe.modality_config import Modality, ModalityConfig

VECTOR_SHARE = 0.1
PIXEL_POWER = 1 / 3  # mean square of a number that is uniform in 0..1, as pixels roughly are


class ModalityEmbedder(nn.Module):
    """Adds a learnt vector for each modality to embeddings of text, and embeds the features of the others.

    std: that of the embeddings of text. The vectors are drawn from N(0, (0.1 std)²): as long as embeddings,
    they would make all tokens of a sense alike before anything is learnt. The rows of W_image are drawn from
    N(0, 3 std² / image_width) and those of W_audio from N(0, std² / audio_width): with pixels uniform in
    0..1, and log-mel numbers of mean square 1, embeddings of every modality begin with the same spread.
    """

    def __init__(self, config: ModalityConfig, width: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.config = config
        image, audio = config.image_width, config.audio_width
        self.image_proj = Projection(image, width, std=std / math.sqrt(image * PIXEL_POWER))
        self.audio_proj = Projection(audio, width, std=std / math.sqrt(audio))
        self.vectors = nn.Parameter(torch.randn(len(Modality), width) * VECTOR_SHARE * std)

    def forward(self, text: Tensor, modality: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Embeddings (b s d) of tokens whose modality (b s) int64 and features (b s f) are given.

        text (b s d) is what the token table says; it is read where the modality is text. Without the other
        two, every token is text. Numbers of a token beyond the width of its modality are not read.
        """
        # `.value`, because a compiler does not compare tensors with members of an enum
        of_text, of_image, of_video, of_audio = self.vectors
        if modality is None or features is None:
            return text + of_text
        features, kind = features.to(text.dtype), rearrange(modality, "b s -> b s 1")
        seen = self.image_proj(features[..., : self.config.image_width]).to(text.dtype)
        seen = seen + of_image.where(kind == Modality.IMAGE.value, of_video)
        heard = self.audio_proj(features[..., : self.config.audio_width]).to(text.dtype) + of_audio
        other = heard.where(kind == Modality.AUDIO.value, seen)
        return (text + of_text).where(kind == Modality.TEXT.value, other)


def check_modality_inputs(
    config: ModalityConfig, ids: Tensor, modality: Tensor | None, features: Tensor | None
) -> None:
    """Refuse a modality or features that do not fit ids (b s); both may be None.

    Raises:
        ValueError: one without the other, a wrong shape or dtype, a modality that there is not, or features
            that are not finite (these last two are not looked at inside torch.compile).
    """
    if modality is None and features is None:
        return
    if modality is None or features is None:
        raise ValueError("modality and features come together: give both, or neither for text alone.")
    if modality.shape != ids.shape or modality.dtype != torch.int64:
        raise ValueError(
            f"modality must be int64 of shape {tuple(ids.shape)}, as ids, got {tuple(modality.shape)} of "
            f"{modality.dtype}."
        )
    expected = (*ids.shape, config.feature_size)
    if features.shape != expected or not features.is_floating_point():
        raise ValueError(
            f"features must be floating-point of shape {expected}, with feature_size={config.feature_size} "
            f"numbers a token, got {tuple(features.shape)} of {features.dtype}."
        )
    if torch.compiler.is_compiling() or ids.is_meta or not ids.numel():
        return
    for value in torch.stack(torch.aminmax(modality)).tolist():
        if not 0 <= value < len(Modality):
            raise ValueError(f"modality {value} must be from 0 to {len(Modality) - 1}: {_names()}.")
    if not bool(features.isfinite().all()):
        raise ValueError("features hold NaN or infinity. Look for it where the sequence was made.")


def _names() -> str:
    return ", ".join(f"{modality.value} {modality.name.lower()}" for modality in Modality)
