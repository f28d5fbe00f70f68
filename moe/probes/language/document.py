"""Documents: the book of a language and parallel examples, in any order, with real text between them.

    !SOV na pn sKIB ;       order; noun, adjective; plural word, noun; the plural word
    dogVUR ;                an entry of the dictionary
    ?Sbig Sdogs Vsee Ocat>SpKIB SnVUR SaWO OnFEMA VvTAS ;   a sentence and its translation

Each piece begins with a new line. A translation begins right behind the last letter of its word, where a
key that is shifted by one byte finds it. A word ends alike everywhere, in a space: were it the semicolon in
the book, copying would end a sentence after any word.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.probes.language.grammar import PLURAL, Item, Language, Part

WORD_END, END = " ", ";"


class Piece(NamedTuple):
    """Bytes of a document, and where foreign words begin in them, by their English word.

    In a grammar line also where roles stand, by their letters, and kinds, by letter and rule: "na" is the n
    beside a, "np" that beside p.
    """

    text: bytes
    words: dict[str, int] = {}  # noqa: RUF012 - never changed


class Answer(NamedTuple):
    """A question and its answer, with its end; `parts` are its words and their glosses."""

    query: bytes
    answer: bytes
    parts: list[Part]


def grammar_line(language: Language) -> Piece:
    """The rules, with the plural word."""
    adjective = "an" if language.adjective_first else "na"
    plural = "pn" if language.plural_first else "np"
    head = f"\n!{language.order} {adjective} {plural} {PLURAL}"
    places = {role: 2 + i for i, role in enumerate(language.order)} | {PLURAL: len(head)}
    places |= {letter + "a": head.index(adjective) + i for i, letter in enumerate(adjective)}
    places |= {letter + "p": head.index(plural) + i for i, letter in enumerate(plural)}
    return Piece(f"{head}{language.words[PLURAL]}{WORD_END}{END}".encode(), places)


def entry(language: Language, word: str) -> Piece:
    """A word and its translation."""
    return Piece(f"\n{word}{language.words[word]}{WORD_END}{END}".encode(), {word: len(word) + 1})


def ask(language: Language, what: Item) -> Answer:
    """A sentence, phrase or word, and what should be written after it."""
    parts = language.translate(what)
    answer = "".join(part.gloss + part.foreign + WORD_END for part in parts) + END
    return Answer(f"\n?{what.english}>".encode(), answer.encode(), parts)


def book(rng: np.random.Generator, language: Language, *, has_grammar: bool, entries: float) -> list[Piece]:
    """The pieces of a book in random order; `entries` is the share of the dictionary that it has."""
    words = [word for word in language.words if word != PLURAL]
    kept = rng.permutation(len(words))[: round(entries * len(words))].tolist()
    pieces = [entry(language, words[i]) for i in kept]
    if has_grammar:
        pieces.insert(int(rng.integers(len(pieces) + 1)), grammar_line(language))
    return pieces


@dataclass(slots=True)
class Laid:
    """Pieces laid out, filler between them.

    starts  of each piece
    words   where each foreign word of the book begins and each role and kind is named: `Piece.words` of all
    """

    text: bytes
    starts: list[int]
    words: dict[str, int] = field(default_factory=dict)


def lay_out(rng: np.random.Generator, pieces: list[Piece], filler: NDArray[np.uint8]) -> Laid:
    """The pieces one after another, the filler cut at random and put before each of them."""
    cuts = [0, *np.sort(rng.integers(len(filler) + 1, size=max(len(pieces) - 1, 0))).tolist(), len(filler)]
    parts: list[bytes] = []
    starts: list[int] = []
    words: dict[str, int] = {}
    place = 0
    for i, piece in enumerate(pieces):
        gap = filler[cuts[i] : cuts[i + 1]].tobytes()
        place += len(gap)
        starts.append(place)
        words |= {word: place + offset for word, offset in piece.words.items()}
        parts += [gap, piece.text]
        place += len(piece.text)
    return Laid(b"".join(parts), starts, words)
