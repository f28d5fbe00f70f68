"""The order of the pieces of a training sequence: filler, needles, and queries, half of them at the end."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which piece of a sequence is what.

    needle_piece, query_piece  (pairs) int64: the numbers of the pieces of pair i
    filler_pieces              the numbers of those that are filler
    pieces                     how many there are
    """

    needle_piece: NDArray[np.int64]
    query_piece: NDArray[np.int64]
    filler_pieces: range
    pieces: int


def lay_out(rng: np.random.Generator, pairs: int) -> Layout:
    """Needles and half of the queries in random order, filler before each, then the other queries.

    Each query stands after its needle: one drawn before it changes places with it.
    """
    order = rng.permutation(pairs)
    inside, last = np.split(order, [pairs // 2])
    slots = rng.permutation(pairs + len(inside))
    needle_slot, query_slot = slots[:pairs], slots[pairs:]
    of_pair = needle_slot[inside]
    needle_slot[inside], query_slot = np.minimum(of_pair, query_slot), np.maximum(of_pair, query_slot)

    # Every slot is two pieces, filler and an item; the last filler stands before the queries at the end.
    ends = 2 * len(slots) + 1
    needle_piece = 2 * needle_slot + 1
    query_piece = np.empty_like(needle_piece)
    query_piece[inside] = 2 * query_slot + 1
    query_piece[last] = ends + np.arange(len(last))
    return Layout(needle_piece, query_piece, range(0, ends, 2), ends + len(last))


def draw_cuts(rng: np.random.Generator, size: int, count: int) -> list[int]:
    """Where to cut `size` things at random into `count` parts: 0, the cuts in order, `size`."""
    return [0, *np.sort(rng.integers(size + 1, size=count - 1)).tolist(), size]
