"""One sequence of tokens of several senses, small enough to hold millions of them.

Axes: s tokens, n tokens that are no text, f features of a token, b sequences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe.cross_entropy import IGNORED
from moe.modality_config import Modality

PaddingSide = Literal["right", "left"]


@dataclass(frozen=True, slots=True, eq=False)
class Interleaved:
    """Tokens of text, images, video and sound in one order; positions are the tokens' own places.

    ids       (s) uint8 or int64, 0 where there is no text
    modality  (s) uint8, of `Modality`
    features  (n f) float32: a row for each token that is no text, in order, and 0 beyond its modality's width

    Ten million bytes of text take 20 MB. A slice `[a:b]` shares its memory.

    Raises:
        ValueError: shapes or dtypes that do not fit, or another number of rows than of tokens without text.
    """

    ids: Tensor
    modality: Tensor
    features: Tensor

    def __post_init__(self) -> None:
        if self.ids.dim() != 1 or self.ids.dtype not in (torch.uint8, torch.int64):
            raise ValueError(f"ids must be (s) of uint8 or int64, got {_describe(self.ids)}.")
        if self.modality.shape != self.ids.shape or self.modality.dtype != torch.uint8:
            raise ValueError(
                f"modality must be uint8 of shape {tuple(self.ids.shape)}, as ids, got "
                f"{_describe(self.modality)}."
            )
        if self.features.dim() != 2 or self.features.dtype != torch.float32:
            raise ValueError(f"features must be (n f) of float32, got {_describe(self.features)}.")
        rows = int(torch.count_nonzero(self.modality))
        if len(self.features) != rows:
            raise ValueError(f"features has {len(self.features)} rows, but {rows} tokens are no text.")

    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids)

    def __getitem__(self, places: slice) -> "Interleaved":
        """The tokens of a slice without a step."""
        start, stop, step = places.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of a sequence has no step, got {step}.")
        before = int(torch.count_nonzero(self.modality[:start]))
        return self._cut(start, max(start, stop), before)

    def pieces(self, size: int) -> Iterator["Interleaved"]:
        """The sequence in slices of `size` tokens, the last one shorter; in time linear in its length."""
        before = 0
        for start in range(0, len(self), size):
            piece = self._cut(start, min(start + size, len(self)), before)
            before += len(piece.features)
            yield piece

    def _cut(self, start: int, stop: int, before: int) -> "Interleaved":
        modality = self.modality[start:stop]
        rows = int(torch.count_nonzero(modality))
        return Interleaved(self.ids[start:stop], modality, self.features[before : before + rows])

    @classmethod
    def concatenate(cls, parts: Sequence["Interleaved"]) -> "Interleaved":
        """The parts, one after another; ids are uint8 where those of every part are.

        Raises:
            ValueError: no parts, or parts with other numbers of features.
        """
        if not parts:
            raise ValueError("there is nothing to concatenate: give at least one sequence.")
        if len(sizes := {part.features.shape[1] for part in parts}) > 1:
            raise ValueError(
                f"the parts have {sorted(sizes)} features a token. Make all with one ModalityConfig."
            )
        return cls(
            torch.cat([part.ids for part in parts]),  # of both dtypes: int64
            torch.cat([part.modality for part in parts]),
            torch.cat([part.features for part in parts]),
        )

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids (s) int64, modality (s) int64, features (s f), 0 where there is text: for `Decoder.embed`."""
        features = self.features.new_zeros(len(self), self.features.shape[1])
        features[self.modality != Modality.TEXT] = self.features
        return self.ids.to(torch.int64), self.modality.to(torch.int64), features

    @property
    def loss_mask(self) -> Tensor:
        """(s) bool, True where the next token is text: what can be learnt from this sequence by its ids."""
        follows = torch.zeros(len(self), dtype=torch.bool, device=self.ids.device)
        follows[:-1] = self.modality[1:] == Modality.TEXT
        return follows

    @property
    def targets(self) -> Tensor:
        """(s) int64, the next id where the next token is text, else IGNORED."""
        return next_text(self.ids.to(torch.int64), self.loss_mask)


def next_text(ids: Tensor, loss_mask: Tensor) -> Tensor:
    """The next id of ids (... s) int64 where loss_mask (... s) says so, else IGNORED."""
    return ids.roll(-1, -1).where(loss_mask, IGNORED)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


@dataclass(frozen=True, slots=True, eq=False)
class ModalityBatch:
    """Sequences side by side, each padded to the longest with text that the mask hides.

    ids       (b s) int64, 0 where there is no text
    modality  (b s) int64, of `Modality`
    features  (b s f) float32, 0 where there is text and beyond the width of a modality
    mask      (b s) bool, True at real tokens
    """

    ids: Tensor
    modality: Tensor
    features: Tensor
    mask: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `Decoder.embed` takes."""
        return self.ids, self.modality, self.features

    @property
    def padding(self) -> Tensor | None:
        """The mask, or None where every token is real: attention is much faster without one."""
        return None if bool(self.mask.all()) else self.mask

    @property
    def loss_mask(self) -> Tensor:
        """(b s) bool, True at real tokens whose next token is real text."""
        is_text = self.mask & (self.modality == Modality.TEXT)
        follows = self.mask & is_text.roll(-1, -1)
        follows[:, -1:] = False
        return follows

    @property
    def targets(self) -> Tensor:
        """(b s) int64, the next id at places of `loss_mask`, else IGNORED."""
        return next_text(self.ids, self.loss_mask)

    def to(self, device: torch.device | str) -> "ModalityBatch":
        """The batch on another device."""
        return ModalityBatch(*(x.to(device) for x in (*self.inputs, self.mask)))


def collate(sequences: Sequence[Interleaved], *, padding_side: PaddingSide = "right") -> ModalityBatch:
    """Sequences in one batch, padded at the right for training, or at the left to be continued.

    Raises:
        ValueError: no sequences, an empty one, or other numbers of features.
    """
    if not sequences or not all(map(len, sequences)):
        raise ValueError("a batch needs sequences of at least one token; leave empty ones out.")
    if padding_side not in get_args(PaddingSide):
        raise ValueError(f'padding_side={padding_side!r} must be "right" or "left".')
    if len(sizes := {sequence.features.shape[1] for sequence in sequences}) > 1:
        raise ValueError(f"the sequences have {sorted(sizes)} features a token. Make all with one config.")
    real = [torch.ones(len(sequence), dtype=torch.bool) for sequence in sequences]
    columns = [*zip(*(sequence.dense() for sequence in sequences), strict=True), real]
    return ModalityBatch(*(pad_sequence(list(column), True, 0, padding_side) for column in columns))
