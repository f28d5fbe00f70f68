"""What can be seen and heard: rows of features, from which sequences of any length are put together.

A sequence names rows, so that ten million tokens are integers until the end. Rows of the two splits share
nothing: other images, other recordings, tones and noise drawn anew.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from moe.mel import log_mel
from moe.modality_config import Modality, ModalityConfig
from moe.probes.senses.config import FRAMES, SensesConfig
from moe.probes.senses.film import load_film
from moe.probes.senses.handwriting import SIDE, Handwriting, Split, affine_copies, load_handwriting
from moe.probes.senses.keypad import SOURCE, keypad_tones, other_sounds
from moe.probes.senses.recordings import load_recordings, parts_of

Rows = NDArray[np.int64]
TONES, SOUNDS, SCRAMBLED = {"train": 400, "test": 200}, 2000, 2000  # of each digit; in all; in all
_SEEDS = {"train": 0x5EED, "test": 0x7E57}


@dataclass(frozen=True, slots=True, eq=False)
class DigitRows:
    """The rows that show digits: entries (n w), sorted by digit, of which a clip takes `together`.

    Entries of a clip are different ones: three images of a seven are three people's, or moments'.
    starts (11): digit i owns entries starts[i] to starts[i + 1] - 1.
    """

    entries: Rows
    starts: NDArray[np.int64]
    together: int

    @classmethod
    def of(cls, entries: Rows, labels: NDArray[np.integer], together: int) -> Self:
        """Entries (n w) and the digit of each (n).

        Raises:
            ValueError: fewer entries of a digit than a clip shows.
        """
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(11))
        if (fewest := int(np.diff(starts).min())) < together:
            raise ValueError(
                f"a clip shows {together} different entries, and of one digit there are {fewest}."
            )
        return cls(entries[order], starts, together)

    @property
    def frames(self) -> int:
        """Tokens that show one digit."""
        return self.together * self.entries.shape[1]

    def draw(self, rng: np.random.Generator, digits: NDArray[np.integer]) -> Rows:
        """A clip for each of the digits (k): rows (k frames)."""
        first = self.starts[digits]
        which = draw_different(rng, self.starts[digits + 1] - first, self.together)
        return rearrange(self.entries[first[:, None] + which], "k n w -> k (n w)")


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """features (r f) float32, and which of these rows are what.

    digits        for each modality but text, the rows that show digits
    others        for each, rows that show none, one by one
    film          rows of consecutive frames of a video; empty where there is none
    digit_of_row  (r) int64: the digit that a row shows, -1 where it shows none
    sources       for each modality but text, what its rows are
    """

    features: NDArray[np.float32]
    digits: Mapping[Modality, DigitRows]
    others: Mapping[Modality, Rows]
    film: Rows
    digit_of_row: NDArray[np.int64]
    sources: Mapping[Modality, str]


def build_bank(
    config: SensesConfig, modalities: ModalityConfig, split: Split, *, seed: int = 0, film: Path | None = None
) -> Bank:
    """All rows of a split. `film`: a video file, whose frames are filler beside scrambled images.

    Raises:
        ImportError, FileNotFoundError, ValueError: as `load_handwriting`, `load_recordings`, `load_film`, or
            patches of another size than the images.
    """
    check_patches(modalities)
    rng = np.random.default_rng([_SEEDS[split], seed])
    making = _Making(modalities.feature_size)
    written = load_handwriting(split)
    seen = making.images(rng, written, config.image_copies if split == "train" else 0)
    heard = making.speech(config, modalities, split) if config.speech_folder else None
    audio, source = heard or making.keypad(rng, modalities, TONES[split])
    images = written.images.reshape(len(written.images), -1)
    scrambled = rng.permuted(images[rng.integers(len(images), size=SCRAMBLED)], axis=1)
    silent = making.add(scrambled)
    sounds = other_sounds(rng, SOUNDS, samples=_samples(modalities), rate=modalities.sampling_rate)
    noise = making.add(_frames(sounds, modalities))
    shown = making.add(load_film(film, side=SIDE).reshape(-1, SIDE * SIDE)) if film else np.empty(0, np.int64)
    look = {Modality.IMAGE: seen, Modality.VIDEO: seen, Modality.AUDIO: audio}
    video = written.source if film is None else f"{written.source}; filler also of {film.name}"
    return making.bank(
        look,
        {Modality.IMAGE: silent, Modality.VIDEO: silent, Modality.AUDIO: noise},
        shown,
        {Modality.IMAGE: written.source, Modality.VIDEO: video, Modality.AUDIO: source},
    )


def check_patches(modalities: ModalityConfig) -> None:
    """Refuse patches that are no whole image of a digit.

    Raises:
        ValueError: they are not.
    """
    if (modalities.patch_size, modalities.num_channels) != (SIDE, 1):
        raise ValueError(
            f"model.modalities has patch_size={modalities.patch_size}, num_channels="
            f"{modalities.num_channels}; images of digits have {SIDE} x {SIDE} grey pixels, a token each. "
            f"Set patch_size={SIDE} and num_channels=1."
        )


def draw_different(rng: np.random.Generator, counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """(k size) numbers, those of row i below counts[i] and all different; each such choice equally likely."""
    drawn = np.empty((len(counts), 0), np.int64)
    for taken in range(size):  # a number among those not taken: one more for each taken one up to it
        number = rng.integers(counts - taken)
        for before in np.sort(drawn, axis=1).T:
            number += number >= before
        drawn = np.concatenate([drawn, number[:, None]], axis=1)
    return drawn


class _Making:
    """A bank in the making: rows are added, padded with zeros to f features."""

    def __init__(self, size: int) -> None:
        self.size, self.parts, self.count = size, list[NDArray[np.float32]](), 0

    def add(self, features: NDArray[np.float32]) -> Rows:
        """Rows (n w) of features -> their numbers (n)."""
        self.parts.append(np.pad(features, ((0, 0), (0, self.size - features.shape[1]))))
        self.count += len(features)
        return np.arange(self.count - len(features), self.count)

    def images(self, rng: np.random.Generator, written: Handwriting, copies: int) -> DigitRows:
        """Images, and copies of them; one entry for each."""
        grown = affine_copies(rng, written.images, copies)  # (n copies+1 8 8)
        rows = self.add(grown.reshape(-1, SIDE * SIDE))
        labels = np.repeat(written.labels, copies + 1)
        return DigitRows.of(rows[:, None], labels, together=FRAMES)

    def keypad(
        self, rng: np.random.Generator, modalities: ModalityConfig, tones: int
    ) -> tuple[DigitRows, str]:
        """Frames of keypad tones; one entry for each."""
        digits = np.repeat(np.arange(10), tones)
        sound = keypad_tones(rng, digits, samples=_samples(modalities), rate=modalities.sampling_rate)
        rows = self.add(_frames(sound, modalities))
        return DigitRows.of(rows[:, None], digits, together=FRAMES), SOURCE

    def speech(self, config: SensesConfig, modalities: ModalityConfig, split: Split) -> tuple[DigitRows, str]:
        """Recordings, each an entry of `speech_frames` frames."""
        folder = Path(config.speech_folder or "").expanduser()
        recordings, source = load_recordings(folder, split, rate=modalities.sampling_rate)
        entries = [
            self.add(
                parts_of(log_mel(torch.from_numpy(one.samples), modalities).numpy(), config.speech_frames)
            )
            for one in recordings
        ]
        shown = DigitRows.of(np.stack(entries), np.array([one.digit for one in recordings]), together=1)
        return shown, f"{source}, {config.speech_frames} frames a digit"

    def bank(
        self,
        digits: dict[Modality, DigitRows],
        others: dict[Modality, Rows],
        film: Rows,
        sources: dict[Modality, str],
    ) -> Bank:
        """The bank of all rows added."""
        digit_of_row = np.full(self.count, -1, np.int64)
        for shown in digits.values():
            digit_of_row[shown.entries] = np.repeat(np.arange(10), np.diff(shown.starts))[:, None]
        return Bank(np.concatenate(self.parts), digits, others, film, digit_of_row, sources)


def _samples(modalities: ModalityConfig) -> int:
    """Samples of a sound whose middle frame is heard: an even number of hops, and no less than a window."""
    hop = modalities.hop_length
    return 2 * hop * math.ceil(modalities.n_fft / (2 * hop))


def _frames(sounds: NDArray[np.float32], modalities: ModalityConfig) -> NDArray[np.float32]:
    """The log-mel frame in the middle of each sound (n samples), which lies wholly inside of it."""
    hops = sounds.shape[1] // modalities.hop_length
    return log_mel(torch.from_numpy(sounds.ravel()), modalities).numpy()[hops // 2 :: hops]
