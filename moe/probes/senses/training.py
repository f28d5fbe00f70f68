"""Training sequences dense with needles of every sense: a function of (text, bank, config, seed, step)."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.modality_config import Modality
from moe.probes.needle.layout import draw_cuts, lay_out
from moe.probes.needle.needles import KEY_LETTERS, Fact, draw_needles
from moe.probes.senses.bank import Bank
from moe.probes.senses.config import NAMES, TEMPLATE, VALUE_DIGITS, SensesConfig, pair_tokens
from moe.probes.senses.filler import draw_filler
from moe.probes.senses.tokens import Tokens, write_needle

Array = NDArray[np.int64]
ANSWER, TEXT, READING = range(3)  # why a place is predicted
_ZERO = ord("0")


@dataclass(frozen=True, slots=True, eq=False)
class SensesBatch:
    """Sequences and what is predicted of them; m places in each, in ascending order.

    ids       (b s) int64    bytes; 0 where there is no text
    modality  (b s) int64    of `Modality`
    features  (b s f)        of the tokens that are no text; 0 elsewhere
    places    (b m) int64    positions where something is predicted
    targets   (b m) int64    what: for ANSWER and TEXT the next byte, for READING the digit that stands there
    kinds     (b m) int64    ANSWER, TEXT or READING
    pointers  (b m) int64    for an answer: the first frame, in its needle, of the digit to be given; else -1
    widths    (b m) int64    how many frames show it
    """

    ids: Tensor
    modality: Tensor
    features: Tensor
    places: Tensor
    targets: Tensor
    kinds: Tensor
    pointers: Tensor
    widths: Tensor


def senses_batch(
    text: NDArray[np.uint8],
    bank: Bank,
    config: SensesConfig,
    *,
    length: int,
    batch: int,
    seed: int,
    step: int,
) -> SensesBatch:
    """The sequences of one step, counted from 0, with filler from `text` (any size, may be memory-mapped).

    Raises:
        ValueError: a text shorter than a sequence, or sequences too short for a needle and its query.
    """
    if length < config.least_length:
        raise ValueError(
            f"length={length} must be at least {config.least_length} tokens: the longest needle and its "
            f"query have to fit into senses.needle_share={config.needle_share} of it."
        )
    if len(text) <= length:
        raise ValueError(
            f"the text of {len(text)} bytes must be longer than a sequence of {length}. "
            f"Give more text or shorten the sequence."
        )
    rng = np.random.default_rng([seed, step])
    rows = [_draw_row(rng, text, bank, config, length) for _ in range(batch)]
    return SensesBatch(
        *(
            torch.from_numpy(np.stack([getattr(row, field.name) for row in rows]))
            for field in fields(SensesBatch)
        )
    )


class _Row(NamedTuple):
    ids: Array
    modality: Array
    features: NDArray[np.float32]
    places: Array
    targets: Array
    kinds: Array
    pointers: Array
    widths: Array


class _Pair(NamedTuple):
    modality: Modality
    fact: Fact


def _draw_row(
    rng: np.random.Generator, text: NDArray[np.uint8], bank: Bank, config: SensesConfig, length: int
) -> _Row:
    pairs = _draw_pairs(rng, config, length)
    layout = lay_out(rng, len(pairs))
    pieces = [Tokens.of_text(b"")] * layout.pieces
    for pair, needle, query in zip(
        pairs, layout.needle_piece.tolist(), layout.query_piece.tolist(), strict=True
    ):
        pieces[needle] = write_needle(rng, bank, pair.modality, pair.fact)
        pieces[query] = Tokens.of_text(TEMPLATE.ask(pair.fact.key) + pair.fact.value + TEMPLATE.close)
    left = length + 1 - sum(map(len, pieces))
    filler, _ = draw_filler(rng, bank, text, left)
    cuts = pairwise(draw_cuts(rng, left, len(layout.filler_pieces)))
    for number, (i, j) in zip(layout.filler_pieces, cuts, strict=True):
        pieces[number] = filler[i:j]
    starts = np.fromiter(accumulate(map(len, pieces), initial=0), np.int64)
    tokens = Tokens.concatenate(pieces)

    pointer_at, width_at = np.full((2, length), -1, np.int64)
    digit = np.arange(VALUE_DIGITS)
    for pair, needle, query in zip(pairs, layout.needle_piece, layout.query_piece, strict=True):
        width = config.frames(pair.modality)
        answers = starts[query] + len(TEMPLATE.ask(pair.fact.key)) - 1 + digit
        pointer_at[answers] = starts[needle] + TEMPLATE.value_start(pair.fact.key) + digit * width
        width_at[answers] = width
    return _choose(rng, bank, config, tokens, pointer_at, width_at)


def _draw_pairs(rng: np.random.Generator, config: SensesConfig, length: int) -> list[_Pair]:
    """As many facts as the budgets of tokens and of answers hold, each in a modality drawn for it."""
    chosen = [NAMES[name] for name in config.modalities]
    least = min(pair_tokens(KEY_LETTERS[0], config.frames(modality)) for modality in chosen)
    budget, answers = config.needle_share * (length + 1), config.predicted(length)
    most = int(min(budget / least, answers / VALUE_DIGITS))
    facts = draw_needles(
        rng,
        most,
        near_duplicate_keys=config.near_duplicate_keys,
        near_duplicate_values=config.near_duplicate_values,
        digits=VALUE_DIGITS,
    )
    pairs = [
        _Pair(chosen[i], fact) for i, fact in zip(rng.integers(len(chosen), size=most), facts, strict=True)
    ]
    return list(_within(pairs, budget, config))


def _within(pairs: Iterable[_Pair], budget: float, config: SensesConfig) -> Iterable[_Pair]:
    for pair in pairs:
        budget -= pair_tokens(len(pair.fact.key), config.frames(pair.modality))
        if budget < 0:
            return
        yield pair


def _choose(
    rng: np.random.Generator,
    bank: Bank,
    config: SensesConfig,
    tokens: Tokens,
    pointer_at: Array,
    width_at: Array,
) -> _Row:
    """The row of s + 1 tokens, and its places: all answers, then digits to read, then other text."""
    length = len(pointer_at)
    count = config.predicted(length)
    ids, rows = tokens.ids.astype(np.int64), tokens.rows[:-1]
    shown = np.where(rows >= 0, bank.digit_of_row[rows], -1)
    is_answer, is_digit = pointer_at >= 0, shown >= 0
    is_text = (tokens.modality[1:] == Modality.TEXT) & ~is_answer & ~is_digit

    kind_at = np.full(length, -1, np.int64)
    kind_at[is_answer] = ANSWER
    left = count - int(is_answer.sum())
    read = rng.permutation(np.flatnonzero(is_digit))[: round(config.reading_share * left)]
    kind_at[read] = READING
    kind_at[rng.permutation(np.flatnonzero(is_text))[: left - len(read)]] = TEXT
    places = np.flatnonzero(kind_at >= 0)
    if len(places) < count:  # so little text that digits have to do
        unread = np.flatnonzero(is_digit & (kind_at < 0))
        kind_at[unread[: count - len(places)]] = READING
        places = np.flatnonzero(kind_at >= 0)
    kinds = kind_at[places]
    targets = np.where(kinds == READING, _ZERO + shown[places], ids[places + 1])
    interleaved = tokens[: len(tokens) - 1].interleaved(bank)
    dense_ids, modality, features = (x.numpy() for x in interleaved.dense())
    return _Row(dense_ids, modality, features, places, targets, kinds, pointer_at[places], width_at[places])
