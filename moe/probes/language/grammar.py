"""Random languages, and translation into them: a few English words, a word order, two more rules of grammar.

English is the source, its words are always the same; the language, drawn anew for every document, has its own
words and rules. English here has noun phrases of an adjective or none, a noun and perhaps its plural s.
"""

import string
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np


def _parted(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# Three letters each, so that entries of a dictionary look alike; all plurals are regular
NOUNS = _parted(
    "dog cat cow pig hen owl bat bee ant boy kid son dad mom cop nun "
    "cub ram ewe rat yak emu ape hog doe pup jay eel bug vet gnu asp"
)
VERBS = _parted("see hit hug nag rob tap pat eye get let tip woo vex sue pay aid")
ADJECTIVES = _parted("red big old wet hot shy sad new bad fat mad dry raw coy odd tan")
MOST_WORDS = len(NOUNS) + len(VERBS) + len(ADJECTIVES)
LEAST_WORDS = 4  # two nouns, a verb and an adjective

ORDERS = tuple("".join(order) for order in permutations("SVO"))
PLURAL = "s"
_LETTERS = string.ascii_uppercase
_ADJECTIVE, _PLURAL = 0.5, 0.4  # of the noun phrases have one


class Phrase(NamedTuple):
    """A noun, whether it is many, its adjective or "" for none, and its role in the sentence, S or O."""

    noun: str
    is_plural: bool
    adjective: str
    role: str = "S"

    @property
    def english(self) -> str:
        """Such as "Sbig Sdogs": each word behind the letter of its role."""
        noun = self.noun + PLURAL * self.is_plural
        return " ".join(self.role + word for word in (self.adjective, noun) if word)


class Sentence(NamedTuple):
    """Who does what to whom."""

    subject: Phrase
    verb: str
    object: Phrase

    @property
    def english(self) -> str:
        """Such as "Sbig Sdogs Vsee Ocat"."""
        return f"{self.subject.english} V{self.verb} {self.object.english}"

    @property
    def phrases(self) -> tuple[Phrase, Phrase]:
        """Both noun phrases."""
        return self.subject, self.object


class Word(NamedTuple):
    """One word."""

    english: str


Item = Sentence | Phrase | Word


class Part(NamedTuple):
    """A word of a translation, behind a gloss of two letters: its role and what it is.

    "Sn" is the noun of the subject; v, a, p are verb, adjective and plural word. A word alone has no gloss.
    """

    gloss: str
    english: str
    foreign: str


@dataclass(frozen=True, slots=True)
class Language:
    """The words and the rules of one language.

    words            translation of each English word, and of the plural s, which is a word of its own
    order            of subject, verb and object, such as "SOV"
    adjective_first  an adjective stands before its noun, and before its plural word
    plural_first     the plural word stands right before its noun
    """

    words: dict[str, str]
    order: str
    adjective_first: bool
    plural_first: bool

    def translate(self, what: Item) -> list[Part]:
        """The words of the translation, in the order of the language; the plural s is one of them."""
        if isinstance(what, Word):
            return [self._part("", what.english)]
        if isinstance(what, Phrase):
            return self._phrase(what)
        parts = {
            "S": self._phrase(what.subject),
            "V": [self._part("Vv", what.verb)],
            "O": self._phrase(what.object),
        }
        return [part for letter in self.order for part in parts[letter]]

    def _phrase(self, phrase: Phrase) -> list[Part]:
        parts = [self._part(phrase.role + "n", phrase.noun)]
        if phrase.is_plural:
            parts.insert(not self.plural_first, self._part(phrase.role + "p", PLURAL))
        if phrase.adjective:
            adjective = self._part(phrase.role + "a", phrase.adjective)
            parts.insert(0 if self.adjective_first else len(parts), adjective)
        return parts

    def _part(self, gloss: str, english: str) -> Part:
        return Part(gloss, english, self.words[english])

    @property
    def nouns(self) -> list[str]:
        """Those that the language has a word for."""
        return [word for word in NOUNS if word in self.words]

    @property
    def verbs(self) -> list[str]:
        """Those that the language has a word for."""
        return [word for word in VERBS if word in self.words]

    @property
    def adjectives(self) -> list[str]:
        """Those that the language has a word for."""
        return [word for word in ADJECTIVES if word in self.words]


def draw_language(rng: np.random.Generator, words: int, letters: tuple[int, int]) -> Language:
    """A language of so many words, a quarter of them verbs and a quarter adjectives, and a plural word.

    letters: the least and the most of a foreign word. No two words are alike.

    Raises:
        ValueError: more or fewer words than there are, or letters that are no range from 1.
    """
    check_words(words, letters)
    few = max(1, round(words / 4))
    english = [
        word
        for pool, count in ((NOUNS, words - 2 * few), (VERBS, few), (ADJECTIVES, few))
        for word in np.array(pool)[rng.permutation(len(pool))[:count]].tolist()
    ]
    foreign = _draw_words(rng, words + 1, letters)
    return Language(
        words=dict(zip([*english, PLURAL], foreign, strict=True)),
        order=ORDERS[rng.integers(len(ORDERS))],
        adjective_first=bool(rng.integers(2)),
        plural_first=bool(rng.integers(2)),
    )


def check_words(words: int, letters: tuple[int, int]) -> None:
    """Refuse a size of dictionary or of words that cannot be drawn.

    Raises:
        ValueError: it cannot.
    """
    if not LEAST_WORDS <= words <= MOST_WORDS:
        raise ValueError(
            f"words={words} of a dictionary must be from {LEAST_WORDS} to {MOST_WORDS}: "
            f"so many English words there are."
        )
    least, most = letters
    if not 2 <= least <= most <= 8:
        raise ValueError(f"letters={letters} must be the least and the most of a word, from 2 to 8.")


def draw_sentences(rng: np.random.Generator, language: Language, count: int) -> list[Sentence]:
    """Random sentences with the words of a language; subject and object are different nouns."""
    nouns, verbs, adjectives = language.nouns, language.verbs, language.adjectives
    chance = rng.random((count, 6))
    first = (chance[:, 0] * len(nouns)).astype(int)
    other = (first + 1 + (chance[:, 1] * (len(nouns) - 1)).astype(int)) % len(nouns)
    verb = (chance[:, 2] * len(verbs)).astype(int)
    plural = rng.random((count, 2)) < _PLURAL
    # one draw says whether there is an adjective and which
    which = (chance[:, 3:5] / _ADJECTIVE * len(adjectives)).astype(int)
    adjective = np.where(which < len(adjectives), which, -1)
    choices = zip(*(x.tolist() for x in (first, other, verb, plural, adjective)), strict=True)
    return [
        Sentence(
            Phrase(nouns[s], plurals[0], adjectives[a[0]] if a[0] >= 0 else ""),
            verbs[v],
            Phrase(nouns[o], plurals[1], adjectives[a[1]] if a[1] >= 0 else "", "O"),
        )
        for s, o, v, plurals, a in choices
    ]


def draw_items(
    rng: np.random.Generator, sentences: list[Sentence], *, words: float, phrases: float
) -> list[Item]:
    """The sentences; of shares of them a word alone, or one of the phrases alone."""
    items: list[Item] = []
    for sentence, chance in zip(sentences, rng.random(len(sentences)).tolist(), strict=True):
        if chance < words:
            noun, _, adjective, _ = sentence.subject
            items.append(Word([noun, sentence.verb, adjective or noun][int(3 * chance / words)]))
        else:
            phrase = sentence.phrases[chance < words + phrases / 2]
            items.append(phrase if chance < words + phrases else sentence)
    return items


def is_shown(sentence: Sentence, examples: list[Sentence]) -> bool:
    """Whether examples show every rule that a sentence needs: of order, of adjectives, of plurals."""
    has_adjective = any(phrase.adjective for one in examples for phrase in one.phrases)
    has_plural = any(phrase.is_plural for one in examples for phrase in one.phrases)
    return (
        bool(examples)
        and (has_adjective or not any(phrase.adjective for phrase in sentence.phrases))
        and (has_plural or not any(phrase.is_plural for phrase in sentence.phrases))
    )


def _draw_words(rng: np.random.Generator, count: int, letters: tuple[int, int]) -> list[str]:
    least, most = letters
    words: dict[str, None] = {}
    while len(words) < count:
        sizes = rng.integers(least, most + 1, size=count).tolist()
        drawn = rng.integers(len(_LETTERS), size=(count, most)).tolist()
        words |= dict.fromkeys(
            "".join(_LETTERS[i] for i in row[:size]) for row, size in zip(drawn, sizes, strict=True)
        )
    return list(words)[:count]
