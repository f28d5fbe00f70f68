"""Refusals of what a decoder cannot read."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_ids(ids: Tensor, vocab_size: int, what: str = "id") -> None:
    """Refuse what is no int64 tensor (b s) of ids in the vocabulary.

    Raises:
        ValueError: says which; inside torch.compile values are not looked at.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(f"{what}s must be an int64 tensor (b s), got {words(ids.shape)} of {ids.dtype}.")
    if torch.compiler.is_compiling() or ids.is_meta or not ids.numel():
        return
    for value in torch.stack(torch.aminmax(ids)).tolist():
        if not 0 <= value < vocab_size:
            raise ValueError(
                f"{what} {value} is outside the vocabulary: ids go from 0 to {vocab_size - 1}. "
                f"Use the tokenizer that the model was trained with."
            )


def check_mask(mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Refuse a mask that is not bool of the shape (b s).

    Raises:
        ValueError: says what it is.
    """
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool with the shape of ids {words(shape)}, True at real tokens; "
            f"got {words(mask.shape)} of {mask.dtype}."
        )


def check_embeds(inputs_embeds: Tensor, width: int) -> None:
    """Refuse what is not floating-point (b s d) with d = width.

    Raises:
        ValueError: says what it is.
    """
    x = inputs_embeds
    if x.dim() != 3 or x.shape[2] != width or not x.is_floating_point():
        raise ValueError(
            f"inputs_embeds must be floating-point (b s d) with d={width}, "
            f"got {words(x.shape)} of {x.dtype}. Decoder.embed makes them."
        )


def words(shape: Sequence[int]) -> str:
    """Such as "(2 16)"."""
    return f"({' '.join(map(str, shape))})"
