"""Filler: runs of text, images, video and sound; half of what is seen and heard are digits without a key."""

import numpy as np
from numpy.typing import NDArray

from moe.modality_config import Modality
from moe.probes.senses.bank import Bank
from moe.probes.senses.tokens import NO_ROW, Tokens

SHARES = {Modality.TEXT: 0.6, Modality.IMAGE: 0.1, Modality.VIDEO: 0.1, Modality.AUDIO: 0.2}  # of the runs
RUN = (8, 64)  # tokens, least and most
LOOKALIKES = 0.5  # of the runs that are no text: digits, shown as a needle shows them


def draw_filler(
    rng: np.random.Generator, bank: Bank, text: NDArray[np.uint8], size: int
) -> tuple[Tokens, NDArray[np.int64]]:
    """`size` tokens in runs, and where they begin. Its text is consecutive, from a random place of `text`.

    Raises:
        ValueError: a text that is too short.
    """
    starts, lengths = _runs(rng, size)
    of_run = rng.choice(np.array(list(SHARES)), p=list(SHARES.values()), size=len(starts))
    modality = np.repeat(of_run, lengths).astype(np.uint8)
    within = (np.arange(size) - np.repeat(starts, lengths)).astype(np.int32)
    run = np.repeat(np.arange(len(starts), dtype=np.int32), lengths)
    is_lookalike = rng.random(len(starts)) < LOOKALIKES

    rows = np.full(size, NO_ROW, np.int32)
    for sense in bank.digits:
        mine = np.flatnonzero(modality == sense)
        shows_digits = is_lookalike[run[mine]]
        chosen = mine[shows_digits]
        rows[chosen] = _lookalikes(rng, bank, sense, within[chosen])
        chosen = mine[~shows_digits]
        rows[chosen] = _others(rng, bank, sense, within[chosen])
    ids = np.zeros(size, np.uint8)
    is_text = modality == Modality.TEXT
    ids[is_text] = _consecutive(rng, text, int(is_text.sum()))
    return Tokens(ids, modality, rows), starts


def _runs(rng: np.random.Generator, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and lengths of runs that fill `size` tokens; the last one is cut off."""
    least, most = RUN
    lengths = rng.integers(least, most + 1, size=size // least + 1)
    ends = lengths.cumsum()
    count = int(np.searchsorted(ends, size)) + 1
    starts = np.concatenate([[0], ends[: count - 1]])
    return starts, np.diff(np.append(starts, size))


def _lookalikes(
    rng: np.random.Generator, bank: Bank, sense: Modality, within: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Random digits, each shown by as many frames as in a needle; `within` counts from 0 in each run."""
    shown = bank.digits[sense]
    frame = within % shown.frames
    digit = (frame == 0).cumsum() - 1
    count = int(digit[-1]) + 1 if len(digit) else 0
    clips = shown.draw(rng, rng.integers(10, size=count))
    return clips[digit, frame]


def _others(
    rng: np.random.Generator, bank: Bank, sense: Modality, within: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Rows without a digit; of a film, consecutive frames from a random place for each run."""
    if sense is Modality.VIDEO and len(bank.film):
        run = (within == 0).cumsum() - 1
        begin = rng.integers(len(bank.film), size=int(run[-1]) + 1 if len(run) else 0)
        return bank.film[(begin[run] + within) % len(bank.film)]
    return rng.choice(bank.others[sense], size=len(within))


def _consecutive(rng: np.random.Generator, text: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if len(text) < size:
        raise ValueError(f"{size} bytes of text are needed, and there are {len(text)}. Give more text.")
    start = int(rng.integers(len(text) - size + 1))
    return np.asarray(text[start : start + size])
