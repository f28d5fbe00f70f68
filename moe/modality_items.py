"""What a sequence is made of: text, an image, a video, a sound; each knows how it becomes tokens.

Axes: h w pixels, c channels, t frames, n samples or tokens, f features of a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from moe.mel import log_mel
from moe.modality_config import Modality, ModalityConfig
from moe.modality_sequence import Interleaved

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = Tensor | NDArray[Any] | Sequence[Any]

    Encode = Callable[[bytes], Array]  # of UTF-8 text, as the tokenizers of moe.train have it


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A str or bytes, which a tokenizer encodes, or ids that are taken as they are."""

    content: "str | bytes | Array"

    def tokens(self, config: ModalityConfig, encode: "Encode" = bytes) -> Interleaved:
        """A token for each id.

        Raises:
            ValueError: no ids, or something else than whole numbers from 0 on.
        """
        content = self.content.encode() if isinstance(self.content, str) else self.content
        ids = _ids(encode(content) if isinstance(content, bytes) else content)
        modality = torch.full_like(ids, Modality.TEXT, dtype=torch.uint8)
        return Interleaved(ids, modality, torch.zeros(0, config.feature_size))


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """pixels (h w), or (h w c) with the channels last: uint8, or floating-point in 0..1."""

    pixels: "Array"

    def tokens(self, config: ModalityConfig, encode: "Encode" = bytes) -> Interleaved:
        """A token for each patch, row by row; zeros fill the last patches up at the right and below.

        Raises:
            ValueError: another rank, number of channels, dtype or range; no pixels, NaN.
        """
        pixels = _pixels(self.pixels, "h w", config)
        return _not_text(Modality.IMAGE, patches(pixels[None], config), config)


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """frames (t h w), or (t h w c): as images; fps is how many there are in a second, where that matters."""

    frames: "Array"
    fps: float | None = None

    def tokens(self, config: ModalityConfig, encode: "Encode" = bytes) -> Interleaved:
        """The patches of one frame after another; of `config.fps` frames a second, if it says so.

        Raises:
            ValueError: as an image; no frames; an fps that is not positive, or none where it is needed.
        """
        frames = _pixels(self.frames, "t h w", config)
        return _not_text(Modality.VIDEO, patches(frames[self._chosen(len(frames), config)], config), config)

    def _chosen(self, frames: int, config: ModalityConfig) -> list[int]:
        """Frame floor(j fps / config.fps) for j = 0, 1, ...; every frame where the video has no more."""
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps={self.fps} must be a positive number of frames a second.")
        if config.fps is None:
            return list(range(frames))
        if self.fps is None:
            raise ValueError(f"frames are sampled {config.fps} times a second: say the video's own fps.")
        apart = max(self.fps / config.fps, 1.0)
        return [int(j * apart) for j in range(frames) if int(j * apart) < frames]


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """waveform (n) of one channel: floating-point in -1..1, or int16; rate is its samples a second."""

    waveform: "Array"
    rate: float

    def tokens(self, config: ModalityConfig, encode: "Encode" = bytes) -> Interleaved:
        """A token for each log-mel frame, 1 + n // hop_length of them (moe.mel).

        Raises:
            ValueError: another rank, dtype, range or rate; no samples, NaN.
        """
        if self.rate != config.sampling_rate:
            raise ValueError(
                f"rate={self.rate} must be the model's sampling_rate={config.sampling_rate}. Resample the "
                f"waveform first, for example with scipy.signal.resample_poly or torchaudio."
            )
        samples = _array(self.waveform, "a waveform")
        if samples.dim() != 1:
            raise ValueError(
                f"a waveform is (n) samples of one channel, got {tuple(samples.shape)}. Take one channel, or "
                f"the mean over them."
            )
        if samples.dtype == torch.int16:
            samples = samples.float() / 32768
        _check_range(samples, "a waveform", "floating-point in -1..1, or int16", -1)
        return _not_text(Modality.AUDIO, log_mel(samples.float(), config), config)


Item = Text | Image | Video | Audio


def patches(frames: Tensor, config: ModalityConfig) -> Tensor:
    """frames (t h w c) -> (n image_width): frame by frame and row by row, a patch's pixels row by row, each
    with its channels; zeros fill up the last patches of a row and of a column."""
    p = config.patch_size
    h, w = frames.shape[1:3]
    whole = F.pad(frames, (0, 0, 0, -w % p, 0, -h % p))
    return rearrange(whole, "t (h p) (w q) c -> (t h w) (p q c)", p=p, q=p)


def _not_text(modality: Modality, rows: Tensor, config: ModalityConfig) -> Interleaved:
    """A token for each row (n width), which zeros fill up to (n f)."""
    features = F.pad(rows, (0, config.feature_size - rows.shape[1]))
    ids = torch.zeros(len(rows), dtype=torch.uint8)
    return Interleaved(ids, torch.full_like(ids, modality), features)


def _ids(values: "Array") -> Tensor:
    """(n) uint8 where that is enough, else int64."""
    if isinstance(values, bytes):
        values = torch.frombuffer(bytearray(values), dtype=torch.uint8) if values else []
    ids = _array(values, "text")
    if ids.dim() != 1 or not ids.numel():
        raise ValueError(f"text is (n) ids, at least one, got {tuple(ids.shape)}. Leave empty text out.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids of text must be whole numbers, got {ids.dtype}.")
    ids = ids if ids.dtype == torch.uint8 else ids.to(torch.int64)
    if ids.min() < 0:
        raise ValueError(f"id {int(ids.min())} must not be negative.")
    return ids.to(torch.uint8) if ids.max() < 256 else ids


def _pixels(values: "Array", axes: str, config: ModalityConfig) -> Tensor:
    """Pixels of these axes, with or without channels -> float32 in 0..1, channels last."""
    what = "an image" if axes == "h w" else "a video"
    pixels = _array(values, what)
    rank, channels = len(axes.split()), config.num_channels
    if pixels.dim() == rank and channels == 1:
        pixels = pixels[..., None]
    if pixels.dim() != rank + 1 or pixels.shape[-1] != channels:
        alone = f"({axes}) or " if channels == 1 else ""
        raise ValueError(
            f"{what} is {alone}({axes} c) with num_channels={channels} last, got {tuple(pixels.shape)}. "
            f"Move its channels to the end, or change their number."
        )
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    _check_range(pixels, what, "uint8, or floating-point in 0..1", 0)
    return pixels.float()


def _array(values: Any, what: str) -> Tensor:
    """A tensor on the CPU, of a tensor or of what torch can read as one."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        return torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{what} must be an array of numbers, got {type(values).__name__}: {error}"
        ) from None


def _check_range(values: Tensor, what: str, expected: str, low: int) -> None:
    """Refuse no values, values of another kind than floating-point, and values outside low..1."""
    if not values.numel():
        raise ValueError(f"{what} must not be empty, got shape {tuple(values.shape)}. Leave it out.")
    if not values.is_floating_point():
        raise ValueError(f"{what} must be {expected}, got {values.dtype}.")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{what} holds NaN or infinity, {int((~values.isfinite()).sum())} times.")
    least, most = values.min().item(), values.max().item()
    if least < low or most > 1:
        raise ValueError(f"{what} must be {expected}, got {least:.6g}..{most:.6g}. Scale it down.")
