"""Sequences of several senses as labelled batches: labels are modalities, blocks are their runs."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch

from moe.decoder import Decoder
from moe.modality_config import Modality
from moe.modality_sequence import Interleaved
from moe.probes.specialisation.measure import LabelledBatch

MODALITIES = tuple(modality.name.lower() for modality in Modality)
PASS_TOKENS = 2**14  # of a forward pass


def modality_batches(
    decoder: Decoder, sequences: Iterable[Interleaved], *, length: int
) -> Iterator[LabelledBatch]:
    """The sequences in pieces of at most `length` tokens, each read alone, embedded by `decoder`.

    The labels are numbers of `MODALITIES`. A run that the end of a piece cuts is two blocks.

    Raises:
        ValueError: a length below 1, or as `Decoder.embed`.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1: it is that of a piece, in tokens.")
    device = decoder.head_weight.device
    pieces = (piece for sequence in sequences for piece in sequence.pieces(length))
    for _, alike in groupby(pieces, key=len):
        for batch in _batches(alike, max(1, PASS_TOKENS // length)):
            ids, modality, features = map(torch.stack, zip(*(piece.dense() for piece in batch), strict=True))
            with torch.no_grad():
                embedded = decoder.embed(ids.to(device), modality.to(device), features.to(device))
            yield LabelledBatch(embedded, modality)


def _batches(pieces: Iterable[Interleaved], size: int) -> Iterator[list[Interleaved]]:
    batch: list[Interleaved] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
