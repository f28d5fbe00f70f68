"""A sequence in the making: ids of text, and numbers of rows of a bank for everything else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from moe.modality_config import Modality
from moe.modality_sequence import Interleaved
from moe.probes.needle.needles import Fact
from moe.probes.senses.bank import Bank
from moe.probes.senses.config import TEMPLATE

NO_ROW = -1
_ZERO = ord("0")


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """ids (s) uint8, 0 where there is no text; modality (s) uint8; rows (s) int32 of a bank, -1 for text."""

    ids: NDArray[np.uint8]
    modality: NDArray[np.uint8]
    rows: NDArray[np.int32]

    @classmethod
    def of_text(cls, text: bytes | NDArray[np.uint8]) -> Self:
        """Bytes of text."""
        ids = np.frombuffer(text, np.uint8) if isinstance(text, bytes) else text
        return cls(ids, np.zeros(len(ids), np.uint8), np.full(len(ids), NO_ROW, np.int32))

    @classmethod
    def of_rows(cls, modality: Modality, rows: NDArray[np.integer]) -> Self:
        """Rows (s) of a bank, of one modality."""
        size = len(rows)
        return cls(np.zeros(size, np.uint8), np.full(size, modality, np.uint8), rows.astype(np.int32))

    @classmethod
    def concatenate(cls, parts: Sequence["Tokens"]) -> Self:
        """One after another."""
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.modality for part in parts]),
            np.concatenate([part.rows for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, places: slice) -> "Tokens":
        """The tokens of a slice; no copy."""
        return Tokens(self.ids[places], self.modality[places], self.rows[places])

    def split(self, places: NDArray[np.integer]) -> list["Tokens"]:
        """The parts before, between and after these places."""
        parts = zip(*(np.split(x, places) for x in (self.ids, self.modality, self.rows)), strict=True)
        return [Tokens(*part) for part in parts]

    def interleaved(self, bank: Bank) -> Interleaved:
        """The sequence that a decoder reads."""
        features = bank.features[self.rows[self.modality != Modality.TEXT]]
        arrays = self.ids.copy(), self.modality.copy(), features  # bytes may be read-only, which torch is not
        return Interleaved(*map(torch.from_numpy, arrays))


def write_needle(rng: np.random.Generator, bank: Bank, modality: Modality, fact: Fact) -> Tokens:
    """`@<key>=`, the value in its modality, `;`; every digit as a clip drawn at random."""
    if modality is Modality.TEXT:
        return Tokens.of_text(TEMPLATE.write(fact))
    before, between, after = TEMPLATE.needle
    digits = np.frombuffer(fact.value, np.uint8) - _ZERO
    value = Tokens.of_rows(modality, bank.digits[modality].draw(rng, digits).ravel())
    return Tokens.concatenate([Tokens.of_text(before + fact.key + between), value, Tokens.of_text(after)])
