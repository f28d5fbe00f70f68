"""Training documents: fresh languages, each with many sentences, all of which are predicted.

But for words that stand neither in the book nor in a translation before: their letters can only be guessed.
A batch is a pure function of (text, config, seed, step).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.probes.language.config import FIRST_EXERCISES, LEAST_FILLER, LanguageConfig
from moe.probes.language.document import Piece, ask, book, lay_out
from moe.probes.language.grammar import draw_items, draw_language, draw_sentences

Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingBatch:
    """Documents and what is predicted of them; m places in each, in ascending order.

    ids        (b s) int64  the bytes
    places     (b m) int64  positions whose next byte is predicted
    targets    (b m) int64  that next byte
    is_answer  (b m) bool   whether there is such a place; after a document's last one there are repetitions
    pointers   (b m) int64  the position, in the book, of the byte that is to be copied; -1: it is not there
    """

    ids: Tensor
    places: Tensor
    targets: Tensor
    is_answer: Tensor
    pointers: Tensor


class Shape(NamedTuple):
    """What the documents of a step have in common."""

    words: int
    sentences: int
    filler: int
    single: float  # the share of words among the sentences
    phrases: float


def draw_shape(rng: np.random.Generator, config: LanguageConfig, done: float) -> Shape:
    """`done` is the share of the run that is over."""
    words = config.words
    if rng.random() < config.large_share:
        words = _log_uniform(rng, config.words, config.most_words)
    sentences = _log_uniform(rng, 1, config.most_sentences)
    filler = 0
    if rng.random() < config.filler_share:
        most = config.first_filler + min(done / max(config.ramp, 1e-9), 1) * (
            config.most_filler - config.first_filler
        )
        filler = _log_uniform(rng, LEAST_FILLER, int(most))
    single, phrases = config.exercises, 2 * config.exercises
    begun = max(1 - done / max(config.exercise_ramp, 1e-9), 0.0)
    single += begun * max(FIRST_EXERCISES - single, 0)
    phrases += begun * max(FIRST_EXERCISES - phrases, 0)
    return Shape(words, sentences, filler, single, phrases)


def training_batch(
    text: NDArray[np.uint8],
    config: LanguageConfig,
    *,
    budget: int,
    multiple: int = 1,
    seed: int,
    step: int,
    steps: int,
) -> TrainingBatch:
    """The documents of one step, counted from 0, of a run of `steps`, with filler from `text`.

    budget: bytes of the batch, about, with what fills documents up to the longest. The number of documents
    is a multiple of `multiple`.

    Raises:
        ValueError: a text that is shorter than a document.
    """
    rng = np.random.default_rng([seed, step])
    shape = draw_shape(rng, config, step / steps)
    _check_text(text, shape.filler)
    rows: list[_Row] = []
    length = 0
    while len(rows) < multiple or len(rows) % multiple or (len(rows) + multiple) * length <= budget:
        rows.append(_draw_row(rng, text, config, shape))
        length = max(length, len(rows[-1].text))
    _check_text(text, length)
    most = max(len(row.places) for row in rows)
    ends = rng.integers(len(text) - length, size=len(rows)).tolist()
    padded = [
        np.concatenate([np.frombuffer(row.text, np.uint8), text[end : end + length - len(row.text)]])
        for row, end in zip(rows, ends, strict=True)
    ]
    ids = np.stack(padded).astype(np.int64)
    places = np.stack([_padded(row.places, most, fill=int(row.places[-1])) for row in rows])
    pointers = np.stack([_padded(row.pointers, most, fill=-1) for row in rows])
    is_answer = np.arange(most) < np.array([len(row.places) for row in rows])[:, None]
    targets = np.take_along_axis(ids, places + 1, 1)
    made = ids, places, targets, is_answer, pointers
    return TrainingBatch(*map(torch.from_numpy, made))


def draw_filler(
    rng: np.random.Generator, text: NDArray[np.uint8], size: int, noise_share: float
) -> NDArray[np.uint8]:
    """So many bytes of the text; with this chance a few bytes of any kind, repeated, are a stretch of it.

    Bytes that a text never has would meet a model as vectors that were never trained.
    """
    begin = int(rng.integers(len(text) - size))
    filler = text[begin : begin + size]
    if rng.random() < noise_share:
        first, last = np.sort(rng.integers(size + 1, size=2)).tolist()
        some = rng.integers(256, size=int(rng.integers(1, 9))).astype(np.uint8)
        filler = np.concatenate([filler[:first], np.resize(some, last - first), filler[last:]])
    return filler


class _Row(NamedTuple):
    text: bytes
    places: Array
    pointers: Array


def _draw_row(
    rng: np.random.Generator, text: NDArray[np.uint8], config: LanguageConfig, shape: Shape
) -> _Row:
    language = draw_language(rng, shape.words, config.letter_range)
    chances = rng.random(3) < (config.grammar_share, config.dictionary_share, config.partial_share)
    has_grammar, has_words, is_partial = chances.tolist()
    entries = has_words * (rng.random() if is_partial else 1.0)
    pieces = book(rng, language, has_grammar=has_grammar, entries=entries)
    sentences = draw_sentences(rng, language, shape.sentences)
    items = draw_items(rng, sentences, words=shape.single, phrases=shape.phrases)
    answers = [ask(language, item) for item in items]
    laid = lay_out(
        rng,
        [*pieces, *(Piece(one.query + one.answer) for one in answers)],
        draw_filler(rng, text, shape.filler, config.noise_share),
    )
    places: list[int] = []
    pointers: list[int] = []
    known = set(laid.words)
    for one, start in zip(answers, laid.starts[len(pieces) :], strict=True):
        place = start + len(one.query) - 1
        glosses = [part.gloss for part in one.parts]
        for gloss, english, foreign in one.parts:
            places += range(place, place + len(gloss))
            pointers += [laid.words.get(key, -1) for key in _rules_of(gloss, glosses)]
            place += len(gloss)
            if english in known:
                at = laid.words.get(english)
                size = len(foreign) + 1  # with the space
                places += range(place, place + size)
                pointers += [-1] * size if at is None else range(at, at + size)
            known.add(english)
            place += len(foreign) + 1
        places.append(place)
        pointers.append(-1)  # the end
    return _Row(laid.text, np.array(places), np.array(pointers))


def _rules_of(gloss: str, glosses: list[str]) -> list[str]:
    """Where, in the grammar line, each letter of a gloss is found, as keys of its `Piece.words`.

    The order of adjective and noun is a rule of its own, and so is that of plural word and noun.
    """
    if not gloss:
        return []
    role, kind = gloss
    rule = "a" if kind == "a" or (kind == "n" and role + "a" in glosses) else "p"
    return [role, kind + rule]


def _check_text(text: NDArray[np.uint8], length: int) -> None:
    if len(text) <= length:
        raise ValueError(
            f"the text of {len(text)} bytes must be longer than a document, of which it has to fill up to "
            f"{length}. Give more text (data.folder), or lower language.most_filler."
        )


def _padded(values: Array, size: int, fill: int) -> Array:
    return np.concatenate([values, np.full(size - len(values), fill, np.int64)])


def _log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    return min(most, int(math.exp(rng.uniform(math.log(least), math.log(most + 1)))))
