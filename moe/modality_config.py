"""What a decoder knows of images, video and sound: the sizes of their tokens, as frozen data."""

import math
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
        ValueError: a size below 1, a window shorter than its hop, or a mel band without any frequency.
    """

    patch_size: int = 8  # pixels of a patch's side
    num_channels: int = 1  # of a pixel
    fps: float | None = None  # frames a second that are read of a video; None: all of them
    sampling_rate: int = 8000  # samples a second
    n_fft: int = 256  # samples of a window
    hop_length: int = 256  # samples from one window to the next
    num_mel_bins: int = 40

    def __post_init__(self) -> None:
        check_fields(self)
        for field in fields(self):
            if getattr(self, field.name) is not None:
                require_positive(self, field.name)
        if self.hop_length > self.n_fft:
            raise ValueError(
                f"hop_length={self.hop_length} is over n_fft={self.n_fft}: samples between two windows would "
                f"never be heard. Lower hop_length."
            )
        self._check_bands()

    def _check_bands(self) -> None:
        spacing, edges = self.sampling_rate / self.n_fft, self.mel_edges
        for band, (low, high) in enumerate(zip(edges, edges[2:], strict=False)):
            if (math.floor(low / spacing) + 1) * spacing >= high:
                raise ValueError(
                    f"num_mel_bins={self.num_mel_bins} leaves band {band}, from {low:.0f} to {high:.0f} Hz, "
                    f"without a frequency: n_fft={self.n_fft} has one every {spacing:.1f} Hz. "
                    f"Lower num_mel_bins or raise n_fft."
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
    def mel_edges(self) -> tuple[float, ...]:
        """Hertz where the mel bands begin, culminate and end: num_mel_bins + 2 numbers from 0 to rate / 2.

        They are equally far apart on Slaney's scale, linear below 1000 Hz and logarithmic above.
        """
        last = hertz_to_mel(self.sampling_rate / 2)
        return tuple(mel_to_hertz(last * i / (self.num_mel_bins + 1)) for i in range(self.num_mel_bins + 2))

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


def hertz_to_mel(hertz: float) -> float:
    """Slaney's mel scale: 3 mel are 200 Hz up to 1000 Hz, and 27 mel a factor of 6.4 above."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def mel_to_hertz(mel: float) -> float:
    """The inverse of `hertz_to_mel`."""
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)
