"""What a decoder knows of images, video and sound: the sizes of their tokens, as frozen data."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Self

from moe.config import check_fields, from_plain, require_positive


class Modality(IntEnum):
    """The sense that a token belongs to. These numbers are stored: in sequences, and as rows of a weight."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalityConfig:
    """How images, video frames and waveforms become tokens; keys as in Hugging Face's configs.

    An image or a frame is cut into square patches, a waveform into log-mel frames (moe.mel): a token each.

    Raises:
        ValueError: a size below 1, a window shorter than its hop, or more mel bands than a spectrum has
            numbers.
    """

    patch_size: int = 8  # pixels of a patch's side
    num_channels: int = 1  # of a pixel
    sampling_rate: int = 8000  # samples a second
    n_fft: int = 256  # samples of a window
    hop_length: int = 256  # samples from one window to the next
    num_mel_bins: int = 40

    def __post_init__(self) -> None:
        check_fields(self)
        for field in fields(self):
            require_positive(self, field.name)
        if self.hop_length > self.n_fft:
            raise ValueError(
                f"hop_length={self.hop_length} is over n_fft={self.n_fft}: samples between two windows would "
                f"never be heard. Lower hop_length."
            )
        if self.num_mel_bins > self.n_fft // 2:
            raise ValueError(
                f"num_mel_bins={self.num_mel_bins} is over n_fft / 2 = {self.n_fft // 2}, the numbers of a "
                f"spectrum. Lower num_mel_bins or raise n_fft."
            )

    @property
    def image_width(self) -> int:
        """Numbers of one patch."""
        return self.patch_size**2 * self.num_channels

    @property
    def audio_width(self) -> int:
        """Numbers of one audio frame."""
        return self.num_mel_bins

    @property
    def feature_size(self) -> int:
        """Numbers that a token of any modality has room for; f in shapes."""
        return max(self.image_width, self.audio_width)

    def width(self, modality: Modality) -> int:
        """Numbers that a token of this modality uses, from the first on; 0 for text."""
        widths = {Modality.TEXT: 0, Modality.AUDIO: self.audio_width}
        return widths.get(modality, self.image_width)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from plain data.

        Raises:
            ValueError: an unknown key (with the nearest known one), or values that are refused.
        """
        return from_plain(cls, data)
