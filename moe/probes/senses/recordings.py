"""Recorded speech: a folder of WAV files, each one spoken digit, whose names begin with that digit.

So are those of the Free Spoken Digit Dataset named: 7_jackson_32.wav. A recording belongs to one split, which
the hash of its name decides.
"""

import hashlib
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe.probes.senses.handwriting import Split

TEST_PART = 0.1
SILENCE = 0.05  # of the loudest sample: what is softer at both ends is cut off


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A spoken digit: its samples (n) float32 from -1 to 1, at the rate of its folder."""

    digit: int
    samples: NDArray[np.float32]


def load_recordings(folder: Path, split: Split, *, rate: int) -> tuple[list[Recording], str]:
    """The recordings of a split, without the silence at both ends, and what they are.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file that is no WAV of 8 or 16 bits at this rate, or a digit without a recording.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of spoken digits {str(folder)!r} does not exist.")
    files = sorted(path for path in folder.glob("*.wav") if path.name[0].isdecimal())
    chosen = [path for path in files if _is_test(path) == (split == "test")]
    recordings = [Recording(int(path.name[0]), _trim(read_wav(path, rate=rate))) for path in chosen]
    if missing := sorted(set(range(10)) - {recording.digit for recording in recordings}):
        raise ValueError(
            f"{str(folder)!r} has {len(files)} recordings, {len(recordings)} of them for split {split!r}, "
            f"and none of the digits {missing} there. Give WAV files whose names begin with their digit, "
            f"such as 7_jackson_32.wav, about {round(2 / TEST_PART)} or more of each."
        )
    words = "held out" if split == "test" else "to train on"
    return recordings, f"{len(recordings)} recordings of spoken digits {words} ({folder.name})"


def read_wav(path: Path, *, rate: int) -> NDArray[np.float32]:
    """The samples (n) of a WAV file of 8 or 16 bits, channels averaged, from -1 to 1.

    Raises:
        ValueError: another format, another rate than `rate`, or no sample.
    """
    try:
        with wave.open(str(path)) as file:
            channels, width, there = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is no WAV file of plain samples ({error}).") from None
    if there != rate:
        raise ValueError(
            f"{path} has {there} samples a second and the model reads {rate}. "
            f"Convert the files, or train with model.modalities of sampling_rate={there}."
        )
    if width not in (1, 2):
        raise ValueError(f"{path} has samples of {8 * width} bits; 8 and 16 can be read. Convert it.")
    raw = np.frombuffer(
        data[: len(data) // (width * channels) * width * channels], f"<{'u1' if width == 1 else 'i2'}"
    )
    if not raw.size:
        raise ValueError(f"{path} has no sample.")
    samples = (raw.astype(np.float32) - 128) / 128 if width == 1 else raw.astype(np.float32) / 32768
    return samples.reshape(-1, channels).mean(1)


def parts_of(frames: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    """Log-mel frames (n f), means of `parts` equal parts of them (parts f): a digit of any duration."""
    edges = np.linspace(0, len(frames), parts + 1)
    starts = np.floor(edges[:-1]).astype(int)
    stops = np.maximum(np.ceil(edges[1:]).astype(int), starts + 1)
    return np.stack([frames[start:stop].mean(0) for start, stop in zip(starts, stops, strict=True)])


def _trim(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    loud = np.flatnonzero(np.abs(samples) >= SILENCE * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1]


def _is_test(path: Path) -> bool:
    return int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4]) < TEST_PART * 2**32
