"""Needles in a text: where they go, and the bytes that result. Whole slices move, never single bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.probes.needle.needles import Fact, Template

LINE_REACH = 4096  # a needle moves on to the next line start, unless that is so many bytes away
_NEWLINE = 10


class Writing(NamedTuple):
    """A fact and the template that writes it."""

    template: Template
    fact: Fact

    @property
    def line(self) -> bytes:
        """The needle."""
        return self.template.write(self.fact)


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact in a haystack, written by `template` from position `place` on."""

    fact: Fact
    template: str
    place: int


def choose_places(
    rng: np.random.Generator, text: NDArray[np.uint8], length: int, writings: Sequence[Writing]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Where in a part of the text the needles go, in ascending order, and that part, chosen at random.

    Raises:
        ValueError: needles that do not fit, or a text that is too short.
    """
    needed = length - sum(len(writing.line) for writing in writings)
    if needed < 0:
        raise ValueError(
            f"{len(writings)} needles have {length - needed} bytes and the haystack only {length}. "
            f"Take fewer needles or a longer haystack."
        )
    if len(text) < needed:
        raise ValueError(
            f"a haystack of {length} bytes needs {needed} bytes of text beside its needles, "
            f"and there are {len(text)}. Give more text or a shorter length."
        )
    start = int(rng.integers(len(text) - needed + 1))
    window = text[start : start + needed]
    return _line_points(rng, window, len(writings)), window


def insert(
    window: NDArray[np.uint8], points: NDArray[np.int64], writings: Sequence[Writing]
) -> NDArray[np.uint8]:
    """The text with needle i inserted before its byte number points[i]; points ascend."""
    lines = [np.frombuffer(writing.line, np.uint8) for writing in writings]
    pieces = np.split(window, points)
    return np.concatenate([part for pair in zip(pieces, lines, strict=False) for part in pair] + pieces[-1:])


def starts_of(points: NDArray[np.int64], writings: Sequence[Writing]) -> NDArray[np.int64]:
    """Where in the haystack the needles begin that are inserted at these points of the text."""
    sizes = np.array([len(writing.line) for writing in writings], np.int64)
    return points + sizes.cumsum() - sizes


def needles_at(points: NDArray[np.int64], writings: Sequence[Writing]) -> tuple[Needle, ...]:
    """The needles as they lie in the haystack."""
    starts = starts_of(points, writings).tolist()
    return tuple(Needle(w.fact, w.template.name, start) for w, start in zip(writings, starts, strict=True))


def _line_points(rng: np.random.Generator, window: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """`count` random places of the text in ascending order, each moved on to the next start of a line."""
    points = np.sort(rng.integers(len(window) + 1, size=count))
    line_starts = np.flatnonzero(window == _NEWLINE) + 1
    following = np.append(line_starts, np.iinfo(np.int64).max)[np.searchsorted(line_starts, points)]
    return np.where(following - points < LINE_REACH, following, points)
