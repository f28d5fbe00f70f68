"""Log-mel frames: a waveform as rows of numbers near 0, one row every `hop_length` samples.

    X[t, k] = sum_j w[j] x[t hop + j - n_fft // 2] exp(-2 pi i j k / n_fft)     w: periodic Hann window
    P[t, k] = |X[t, k]|^2 / (sum_j w[j])^2                                      a sine of amplitude a: a^2 / 4
    y[t, m] = (ln(sum_k B[m, k] P[t, k] + 1e-7) + 12) / 4

x is 0 before and after the waveform, so frame t has its middle at sample t hop, and n samples make
1 + n // hop frames. B are triangles of height 1 between `ModalityConfig.mel_edges`, on Slaney's mel scale
(Auditory Toolbox, 1998). Silence is -1.03 and a sine of amplitude 1 up to 2.76: no statistics of a data set
are needed, and a frame depends on nothing beyond its window. The floor is 64 dB below that sine.

Axes: n samples, t frames, k frequencies (n_fft // 2 + 1), m mel bands.
"""

import torch
from einops import einsum
from torch import Tensor

from moe.modality_config import ModalityConfig

FLOOR = 1e-7
CENTRE, SPREAD = -12.0, 4.0


def log_mel(waveform: Tensor, config: ModalityConfig) -> Tensor:
    """waveform (n), in -1..1, at `config.sampling_rate` -> (1 + n // hop_length, num_mel_bins), same dtype.

    Raises:
        ValueError: not one axis of at least one floating-point number.
    """
    if waveform.dim() != 1 or not waveform.is_floating_point() or not len(waveform):
        raise ValueError(
            f"a waveform is (n) floating-point samples, at least one; got {tuple(waveform.shape)} of "
            f"{waveform.dtype}."
        )
    window = torch.hann_window(config.n_fft, dtype=waveform.dtype, device=waveform.device)
    spectrum = torch.stft(
        waveform,
        config.n_fft,
        config.hop_length,
        window=window,
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum.abs().square() / window.sum().square()
    bands = einsum(mel_filters(config).to(power), power, "m k, k t -> t m")
    return ((bands + FLOOR).log() - CENTRE) / SPREAD


def mel_filters(config: ModalityConfig) -> Tensor:
    """B (m k) float64: triangle m rises from edge m to 1 at edge m + 1, and falls to 0 at edge m + 2."""
    frequencies = torch.arange(config.n_fft // 2 + 1, dtype=torch.float64)
    frequencies = frequencies * config.sampling_rate / config.n_fft
    edges = torch.tensor(config.mel_edges, dtype=torch.float64)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies - low) / (middle - low)
    falling = (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0)
