"""Some of the places of a sequence: those whose output of the last layer is wanted.

Axes: b batch, s new tokens, m places chosen.
"""

import torch
from einops import repeat
from torch import Tensor

At = int | Tensor | None  # the last so many places; or (b m) int64, rising in each row; None: all


def check_places(at: At, shape: tuple[int, int]) -> None:
    """Refuse places that a sequence of this shape (b s) has not.

    Raises:
        ValueError: a negative number, or a tensor that is no (b m) int64, or names a place outside 0..s-1.
    """
    b, s = shape
    if isinstance(at, int) and at < 0:
        raise ValueError(f"at={at} must be at least 0: it counts the last places.")
    if not isinstance(at, Tensor):
        return
    if at.dim() != 2 or at.shape[0] != b or at.dtype != torch.int64:
        raise ValueError(f"at must be int64 (b m) with b={b}, got {tuple(at.shape)} of {at.dtype}.")
    if not torch.compiler.is_compiling() and at.numel() and not 0 <= at.min() <= at.max() < s:
        raise ValueError(f"at names places {at.min()} to {at.max()}, but there are {s}.")


def select(x: Tensor, at: At) -> Tensor:
    """The chosen places of x (b s ...), or of (1 s ...) which stands for every row; -> (b m ...)."""
    if at is None:
        return x
    if isinstance(at, int):
        return x[:, max(x.shape[1] - at, 0) :]
    index = at.reshape(*at.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return (x.expand(len(at), *x.shape[1:]) if len(x) != len(at) else x).gather(1, index)


def places_of(at: Tensor, keys: int, window: int | None) -> Tensor:
    """(b 1 m l) bool: what a query at each of the places sees, itself included."""
    key = torch.arange(keys, device=at.device)
    query = repeat(at, "b m -> b 1 m 1")
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
