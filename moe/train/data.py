"""Batches as a pure function of (seed, step): nothing to save, nothing to restore, no worker to wait for.

Tokens (n) are cut into windows of s + 1 that start s apart, so that every token is a target once an epoch.
An epoch visits each window once, in an order that is a keyed permutation computed on the fly: a corpus of
any size needs no list of indices in memory.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROUNDS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Tokens (n), usually memory-mapped, seen as windows of `sequence` inputs and their targets.

    Raises:
        ValueError: the tokens are shorter than one window.
    """

    tokens: NDArray[np.integer]
    sequence: int

    def __post_init__(self) -> None:
        if len(self) < 1:
            raise ValueError(
                f"{len(self.tokens)} tokens are shorter than one sequence of {self.sequence} and a target."
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence

    def take(self, indices: NDArray[np.integer]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (b s) int64 of the windows with these numbers."""
        starts = indices.astype(np.int64)[:, None] * self.sequence
        rows = self.tokens[starts + np.arange(self.sequence + 1)].astype(np.int64)  # (b s+1)
        ids = torch.from_numpy(rows)
        return ids[:, :-1], ids[:, 1:]


def train_batch(windows: Windows, batch: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (b s) of one step, counted from 0: a pure function of its arguments.

    Sequence number j = step * batch + i of a run is place j mod n of epoch j div n. A batch may hold the
    end of one epoch and the beginning of the next.
    """
    numbers = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs, places = np.divmod(numbers, len(windows))
    indices = np.concatenate(
        [
            permute(places[epochs == epoch], len(windows), seed=seed, epoch=int(epoch))
            for epoch in np.unique(epochs)
        ]
    )
    return windows.take(indices)


def permute(places: NDArray[np.integer], size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a permutation of range(size), chosen by (seed, epoch), sends these places.

    A four-round Feistel network over the next even number of bits; a value that falls outside range(size)
    goes through the network again until it is inside (cycle walking; Black and Rogaway 2002).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    values = _feistel(places.astype(np.uint64), half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of the numbers below 2^(2 half)."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
