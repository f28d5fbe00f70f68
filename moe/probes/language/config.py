"""What a decoder is trained on to learn languages in context; plain data, a part of a run's configuration."""

from dataclasses import dataclass

from moe.probes.language.grammar import check_words

LEAST_FILLER = 20  # bytes, where there is some
MOST_EXERCISES, FIRST_EXERCISES = 0.3, 0.4
_SHARES = (
    *("grammar_share", "dictionary_share", "partial_share", "large_share"),
    *("filler_share", "noise_share", "ramp", "exercise_ramp"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """The training documents and the weights of their losses.

    Raises:
        ValueError: a share, a weight or a number out of range.
    """

    share: float = 1.0  # of the steps, beside the shares of a run's other tasks
    words: int = 11  # of the dictionary of a small book
    most_words: int = 64  # of a large one: the numbers between are drawn log-uniformly
    large_share: float = 0.15  # of the batches: large books
    letters: tuple[int, ...] = (2, 4)  # the least and the most of a foreign word
    grammar_share: float = 0.6  # of the documents have a grammar line
    dictionary_share: float = 0.9  # have a dictionary
    partial_share: float = 0.25  # of the dictionaries lack words, up to all of them
    most_sentences: int = 24  # of a document; from 1, log-uniformly
    exercises: float = 0.1  # of the sentences are single words, and twice as many are noun phrases
    exercise_ramp: float = 0.15  # of the steps: until then there are more, at first 0.4 and 0.4
    filler_share: float = 0.5  # of the batches have text between the pieces
    most_filler: int = 2000  # bytes of it; from 20, log-uniformly
    first_filler: int = 40  # the most at the beginning
    noise_share: float = 0.2  # of the documents with filler have, in it, a few bytes of any kind repeated
    ramp: float = 0.6  # of the steps: until then the most filler grows to `most_filler`
    pointer_loss: float = 0.75  # weight of the attention on the byte to copy; 0 switches it off

    def __post_init__(self) -> None:
        if len(self.letters) != 2:
            raise ValueError(
                f"language.letters={list(self.letters)} must be two numbers: the least and the most."
            )
        check_words(self.words, self.letter_range)
        check_words(self.most_words, self.letter_range)
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"language.{name}={getattr(self, name)} is a share: give a number from 0 to 1."
                )
        if not 0 <= self.exercises <= MOST_EXERCISES:
            raise ValueError(
                f"language.exercises={self.exercises} must be from 0 to {MOST_EXERCISES}: "
                f"three times as many are no sentences."
            )
        for name, least in (
            ("most_words", self.words),
            ("most_sentences", 1),
            ("first_filler", LEAST_FILLER),
            ("most_filler", self.first_filler),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"language.{name}={getattr(self, name)} must be at least {least}.")
        if not 0 <= self.pointer_loss < float("inf"):
            raise ValueError(
                f"language.pointer_loss={self.pointer_loss} is the weight of a loss: "
                f"give a number from 0, which switches it off."
            )

    @property
    def letter_range(self) -> tuple[int, int]:
        """The least and the most letters of a word."""
        least, most = self.letters
        return least, most

    @property
    def letters_in_words(self) -> str:
        """Such as "3" or "2-4"."""
        least, most = self.letter_range
        return str(least) if least == most else f"{least}-{most}"
