"""Keypad tones (DTMF, ITU-T Q.23): a digit is two sines. They are synthetic, and every report says so."""

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = (697.0, 770.0, 852.0, 941.0), (1209.0, 1336.0, 1477.0)  # Hz
DETUNE, GAIN, SIGNAL_TO_NOISE = 0.01, (0.3, 1.0), 10.0  # share, least and most, decibels
SOURCE = "keypad tones with noise, synthetic"
_ROWS = ["123", "456", "789", "x0x"]
_PAIRS = {
    key: (low, high) for low, row in zip(LOW, _ROWS, strict=True) for high, key in zip(HIGH, row, strict=True)
}
_TONES = np.array([_PAIRS[str(digit)] for digit in range(10)])  # (10 2) Hz


def keypad_tones(
    rng: np.random.Generator, digits: NDArray[np.integer], *, samples: int, rate: int
) -> NDArray[np.float32]:
    """A waveform (n samples) from -1 to 1 for each of the digits (n), in noise."""
    return _sound(rng, _TONES[digits], samples, rate)


def other_sounds(rng: np.random.Generator, count: int, *, samples: int, rate: int) -> NDArray[np.float32]:
    """Waveforms (count samples) that are no digit: half of them noise, half one tone of a keypad's range."""
    tones = rng.uniform(LOW[0] / 1.2, HIGH[-1] * 1.2, (count // 2, 1))
    noise = rng.normal(0, 0.3, (count - count // 2, samples)) * rng.uniform(*GAIN, (count - count // 2, 1))
    return np.concatenate([_sound(rng, tones, samples, rate), noise.clip(-1, 1).astype(np.float32)])


def _sound(
    rng: np.random.Generator, tones: NDArray[np.float64], samples: int, rate: int
) -> NDArray[np.float32]:
    """Sums of sines of the frequencies tones (n k), with noise."""
    n, k = tones.shape
    time = np.arange(samples) / rate
    frequency = tones * rng.uniform(1 - DETUNE, 1 + DETUNE, (n, k))
    phase = rng.uniform(0, 2 * np.pi, (n, k))
    signal = np.sin(2 * np.pi * frequency[..., None] * time + phase[..., None]).mean(1)
    noise = rng.normal(0, signal.std(1, keepdims=True) * 10 ** (-SIGNAL_TO_NOISE / 20), (n, samples))
    return ((signal + noise) * rng.uniform(*GAIN, (n, 1)) / 1.5).clip(-1, 1).astype(np.float32)
