"""Training sequences dense with needles and queries: a pure function of (text, config, seed, step).

Most bytes of a sequence are needles and queries, so that many of them compete and most of what is predicted
is an answer; the rest is real text. Half of the queries stand anywhere after their needle, half at the end.
"""

from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.probes.needle.config import NeedleConfig
from moe.probes.needle.definitions import Definitions
from moe.probes.needle.layout import draw_cuts, lay_out
from moe.probes.needle.needles import DEFINITION, TEMPLATES, Fact, Template, draw_needles

Array = NDArray[np.int64]
SHORTEST_PASSAGE = 64  # bytes, in a sequence of text alone
MIXED = 0.5  # of the sequences: every pair draws its template; the others have one template each


@dataclass(frozen=True, slots=True, eq=False)
class TrainingBatch:
    """Sequences and what is predicted of them; m places in each, in ascending order.

    ids        (b s) int64  the bytes
    places     (b m) int64  positions whose next byte is predicted
    targets    (b m) int64  that next byte
    is_answer  (b m) bool   the next byte is part of an answer
    pointers   (b m) int64  for an answer: the position, in its needle, of the byte that is to be copied,
                            so ids[pointers] = targets; -1 elsewhere
    """

    ids: Tensor
    places: Tensor
    targets: Tensor
    is_answer: Tensor
    pointers: Tensor


def training_batch(
    text: NDArray[np.uint8],
    config: NeedleConfig,
    *,
    length: int,
    batch: int,
    seed: int,
    step: int,
    definitions: Definitions | None = None,
) -> TrainingBatch:
    """The sequences of one step, counted from 0, with filler from `text` (any size, may be memory-mapped).

    The template `definition` takes its names and paths from `definitions`.

    Raises:
        ValueError: a text shorter than a sequence, sequences too short for a needle and its query, or no
            definitions for a template that needs them.
    """
    if DEFINITION.name in config.templates and definitions is None:
        raise ValueError(
            f"needle.templates names {DEFINITION.name!r}, which asks for functions of real code. "
            f"Give definitions=find_definitions(corpus.train, corpus.root), or leave it out."
        )
    if length < config.least_length:
        raise ValueError(
            f"length={length} must be at least {config.least_length} bytes: the longest needle and its query "
            f"have to fit into needle.needle_share={config.needle_share} of it."
        )
    if len(text) <= length:
        raise ValueError(
            f"the text of {len(text)} bytes must be longer than a sequence of {length}. "
            f"Give more text or shorten the sequence."
        )
    rng = np.random.default_rng([seed, step])
    rows = [_draw_row(rng, text, config, length, definitions) for _ in range(batch)]
    return TrainingBatch(
        *(
            torch.from_numpy(np.stack([getattr(row, field.name) for row in rows]))
            for field in fields(TrainingBatch)
        )
    )


def predicted_places(config: NeedleConfig, length: int) -> int:
    """How many places (m) of a sequence are predicted.

    All answers of a sequence of the template that has most of them, and `text_share` of the other places; so
    few answers that the longest one might not fit are impossible.
    """
    budget = config.needle_share * length
    templates = [TEMPLATES[name] for name in config.templates]
    answers = max(budget / template.mean_pair_bytes * template.mean_value for template in templates)
    longest = max(template.fact_bytes[1] for template in templates)
    return max(longest, round(answers + config.text_share * (length - answers)))


class _Row(NamedTuple):
    ids: Array
    places: Array
    targets: Array
    is_answer: NDArray[np.bool_]
    pointers: Array


class _Pair(NamedTuple):
    """A needle and its query. The answer is the last part of `query`, before `closed`."""

    needle: bytes
    value_start: int  # in the needle
    query: bytes
    value: bytes
    closed: bytes  # query, answer and what follows it


def _draw_row(
    rng: np.random.Generator,
    text: NDArray[np.uint8],
    config: NeedleConfig,
    length: int,
    definitions: Definitions | None,
) -> _Row:
    count, budget = predicted_places(config, length), int(config.needle_share * (length + 1))
    if config.text_sequences and rng.random() < config.text_sequences:
        return _draw_text(rng, text, length, count)
    templates = _draw_templates(rng, config, budget)
    facts = _draw_facts(rng, config, templates, definitions)
    pairs = _fill(templates, facts, budget, most_answers=count)
    pieces, needle_piece, query_piece = _lay_out(rng, pairs, text, length + 1)
    starts = np.fromiter(accumulate(map(len, pieces), initial=0), np.int64)
    row = np.frombuffer(b"".join(pieces), np.uint8).astype(np.int64)

    value_starts = starts[needle_piece] + np.array([pair.value_start for pair in pairs], np.int64)
    answer_starts = starts[query_piece] + np.array([len(pair.query) for pair in pairs], np.int64)
    sizes = np.array([len(pair.value) for pair in pairs], np.int64)
    within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)  # which byte of its answer
    pointer_at = np.full(length, -1, np.int64)
    pointer_at[np.repeat(answer_starts, sizes) + within - 1] = np.repeat(value_starts, sizes) + within

    is_chosen = pointer_at >= 0
    others = np.flatnonzero(~is_chosen)
    is_chosen[rng.permutation(others)[: count - len(within)]] = True
    places = np.flatnonzero(is_chosen)
    pointers = pointer_at[places]
    return _Row(row[:-1], places, row[places + 1], pointers >= 0, pointers)


def _draw_text(rng: np.random.Generator, text: NDArray[np.uint8], length: int, count: int) -> _Row:
    """Passages from anywhere, of any length, predicted at `count` places: what is far away seldom helps."""
    passages: list[NDArray[np.uint8]] = []
    missing = length + 1
    while missing > 0:
        size = min(missing, int(SHORTEST_PASSAGE * (length / SHORTEST_PASSAGE) ** rng.random()) + 1)
        start = int(rng.integers(len(text) - size + 1))
        passages.append(text[start : start + size])
        missing -= size
    row = np.concatenate(passages).astype(np.int64)
    places = np.sort(rng.permutation(length)[:count])
    nothing = np.full(count, -1, np.int64)
    return _Row(row[:-1], places, row[places + 1], nothing >= 0, nothing)


def _draw_templates(rng: np.random.Generator, config: NeedleConfig, budget: int) -> list[Template]:
    """The templates of more pairs than `budget` bytes can hold: of each pair its own, or of all the same."""
    templates = [TEMPLATES[name] for name in config.templates]
    mixed = rng.random() < MIXED
    choices = templates if mixed else [templates[rng.integers(len(templates))]]
    most = budget // min(template.least_pair_bytes for template in choices) + 1
    return [choices[i] for i in rng.integers(len(choices), size=most).tolist()]


def _draw_facts(
    rng: np.random.Generator,
    config: NeedleConfig,
    templates: list[Template],
    definitions: Definitions | None,
) -> list[Fact]:
    """A fact for each template; fewer when there are not as many definitions."""
    keys, values = config.near_duplicate_keys, config.near_duplicate_values
    about_code = [template is DEFINITION for template in templates]
    count = sum(about_code)
    made_up = iter(
        draw_needles(rng, len(templates) - count, near_duplicate_keys=keys, near_duplicate_values=values)
    )
    real = iter(
        definitions.move_deeper(
            rng, definitions.draw(rng, count, near_duplicate_keys=keys, near_duplicate_values=values)
        )
        if definitions and count
        else ()
    )
    facts: list[Fact] = []
    for is_code in about_code:
        fact = next(real if is_code else made_up, None)
        if fact is None:
            break
        facts.append(fact)
    return facts


def _fill(templates: list[Template], facts: list[Fact], budget: int, most_answers: int) -> list[_Pair]:
    """As many pairs as `budget` bytes hold, with at most `most_answers` bytes to answer."""
    pairs = []
    for template, fact in zip(templates, facts, strict=False):
        pair = _pair(template, fact)
        budget -= len(pair.needle) + len(pair.closed)
        most_answers -= len(pair.value)
        if budget < 0 or most_answers < 0:
            break
        pairs.append(pair)
    return pairs


def _pair(template: Template, fact: Fact) -> _Pair:
    query = template.ask(fact.key)
    closed = query + fact.value + template.close
    return _Pair(template.write(fact), template.value_start(fact.key), query, fact.value, closed)


def _lay_out(
    rng: np.random.Generator, pairs: list[_Pair], text: NDArray[np.uint8], size: int
) -> tuple[list[bytes], Array, Array]:
    """The pieces of a row of `size` bytes, and which of them is the needle / query of pair i."""
    layout = lay_out(rng, len(pairs))
    pieces = [b""] * layout.pieces
    numbers = zip(layout.needle_piece.tolist(), layout.query_piece.tolist(), strict=True)
    for pair, (needle, query) in zip(pairs, numbers, strict=True):
        pieces[needle], pieces[query] = pair.needle, pair.closed
    filler = layout.filler_pieces
    for number, part in zip(filler, _cut(rng, text, size - sum(map(len, pieces)), len(filler)), strict=True):
        pieces[number] = part
    return pieces, layout.needle_piece, layout.query_piece


def _cut(rng: np.random.Generator, text: NDArray[np.uint8], size: int, count: int) -> list[bytes]:
    """`size` consecutive bytes of the text, from a random place, cut at random into `count` pieces."""
    start = int(rng.integers(len(text) - size + 1))
    window = text[start : start + size].tobytes()
    return [window[i:j] for i, j in pairwise(draw_cuts(rng, size, count))]
