"""What is asked of a run: languages that it never met, under several conditions, and the text around them."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moe.probes.language.document import Answer, Piece, ask, book, lay_out
from moe.probes.language.grammar import (
    Language,
    Sentence,
    check_words,
    draw_language,
    draw_sentences,
    is_shown,
)
from moe.probes.needle.haystack_text import HaystackText, find_text
from moe.probes.needle.questions import trained_digests
from moe.train.runs import Run


class Condition(NamedTuple):
    """What the book has: a grammar line, and which share of the dictionary's entries."""

    has_grammar: bool
    entries: float


BOTH, DICTIONARY, NEITHER = "grammar + dictionary", "dictionary only", "neither"
CONDITIONS = {
    BOTH: Condition(True, 1.0),
    DICTIONARY: Condition(False, 1.0),
    "grammar only": Condition(True, 0.0),
    "grammar + half a dictionary": Condition(True, 0.5),
    NEITHER: Condition(False, 0.0),
}
MOST_EXAMPLES, TRIES = 64, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """How many questions are asked about how many languages.

    queries    sentences to translate, in all languages together
    languages  so many documents, each with a language, a book and examples of its own
    words      of the dictionary
    folder     text around the pieces; None: source of the installed packages. No file that was trained on
    repeat     repeat the text where there is too little; results say so

    Raises:
        ValueError: no language, fewer queries than languages, a negative seed, no such size of dictionary.
    """

    queries: int = 200
    languages: int = 40
    words: int = 11
    folder: Path | None = None
    repeat: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32  # of the cache

    def __post_init__(self) -> None:
        if not 1 <= self.languages <= self.queries:
            raise ValueError(
                f"languages={self.languages} must be from 1 to queries={self.queries}: each is asked about."
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0.")
        check_words(self.words, (2, 2))

    @property
    def shares(self) -> list[int]:
        """How many questions are asked about each language."""
        each, more = divmod(self.queries, self.languages)
        return [each + (i < more) for i in range(self.languages)]

    def filler(self, run: Run, size: int) -> HaystackText:
        """`size` bytes for each language, of files that the run did not read.

        Raises:
            ValueError, OSError: as `find_text` and `trained_digests`.
        """
        return find_text(
            self.folder,
            bytes_needed=size * self.languages,
            seed=self.seed,
            exclude_digests=trained_digests(run) if size else frozenset(),
            repeat=self.repeat,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Paper:
    """One language: its document (n) uint8, and what is asked after it.

    shown: of each question, whether the examples show every rule that it needs
    given: of each question, whether every word that it needs stands in the book or in an example
    """

    ids: np.ndarray
    answers: tuple[Answer, ...]
    shown: tuple[bool, ...]
    given: tuple[bool, ...]


def write_paper(
    exam: Exam,
    number: int,
    *,
    condition: str,
    examples: int,
    letters: tuple[int, int],
    filler: np.ndarray,
) -> Paper:
    """The document of language `number`, its pieces spread over the filler (n) uint8, and its questions.

    Language, examples and questions depend on `exam.seed`, `number`, `exam.words` and `letters` alone, so all
    conditions and sizes ask the same; with more examples the first ones stay.

    Raises:
        ValueError: a condition that there is not, or too many examples.
    """
    check_asked([condition], [examples])
    rng = np.random.default_rng([exam.seed, number, exam.words, *letters])
    language = draw_language(rng, exam.words, letters)
    shown = draw_sentences(rng, language, MOST_EXAMPLES)[:examples]
    asked = _new_sentences(rng, language, shown, exam.shares[number])
    what = CONDITIONS[condition]
    layout = np.random.default_rng([exam.seed, number, examples, len(filler)])
    pieces = book(layout, language, has_grammar=what.has_grammar, entries=what.entries)
    solved = [ask(language, sentence) for sentence in shown]
    answers = tuple(ask(language, sentence) for sentence in asked)
    known = {word for piece in pieces for word in piece.words}
    known |= {part.english for one in solved for part in one.parts}
    pieces += [Piece(one.query + one.answer) for one in solved]
    text = lay_out(layout, pieces, filler).text if pieces else filler.tobytes()
    return Paper(
        ids=np.frombuffer(text or b"\n", np.uint8),  # nothing at all cannot be read
        answers=answers,
        shown=tuple(is_shown(sentence, shown) for sentence in asked),
        given=tuple(all(part.english in known for part in one.parts) for one in answers),
    )


def check_asked(conditions: list[str], examples: list[int]) -> None:
    """Refuse conditions and numbers of examples that there are not.

    Raises:
        ValueError: there is one.
    """
    for condition in conditions:
        if condition not in CONDITIONS:
            raise ValueError(f"there is no condition {condition!r}. There are: {list(CONDITIONS)}.")
    for count in examples:
        if not 0 <= count <= MOST_EXAMPLES:
            raise ValueError(f"examples={count} must be from 0 to {MOST_EXAMPLES}.")


def _new_sentences(
    rng: np.random.Generator, language: Language, shown: list[Sentence], count: int
) -> list[Sentence]:
    """Different sentences that are none of those shown.

    Raises:
        ValueError: the language is too small to have as many.
    """
    known, new = set(shown), []
    for _ in range(TRIES):
        if len(new) == count:
            return new
        (sentence,) = draw_sentences(rng, language, 1)
        if sentence not in known:
            known.add(sentence)
            new.append(sentence)
    raise ValueError(
        f"a language of {len(language.words) - 1} words has too few sentences to ask {count} new ones. "
        f"Ask about more languages."
    )
