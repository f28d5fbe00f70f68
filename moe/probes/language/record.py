"""What an evaluation of languages measured: plain data, kept as JSON, for tables and figures."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from moe.probes.needle.record import Tally, TextFacts, merge_environments, read_record
from moe.probes.needle.record_checks import check_keys, check_value
from moe.train.files import write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageRow:
    """All questions to one model under one condition, with so many examples and so much filler.

    Raises:
        ValueError: a value of another type or out of range, no question, or not one answer a question.
    """

    run: str
    step: int  # of its training
    total: int  # parameters
    active: int  # parameters that one token uses
    condition: str
    words: int  # of the dictionary, or that it would have
    letters: str  # of a foreign word: "3", or "2-4"
    examples: int
    filler: int  # bytes between the pieces of a document
    languages: int
    exact: tuple[bool, ...]  # of every question: whether the whole sentence was right
    shown: tuple[bool, ...]  # whether the examples show every rule that it needs
    given: tuple[bool, ...]  # whether every word that it needs stands in the book or in an example
    words_right: int
    words_asked: int
    read_seconds: float  # of a document, on average
    seconds: float  # in all
    path: str  # how documents were read
    dtype: str  # of the cache
    text: TextFacts

    def __post_init__(self) -> None:
        for field in fields(self):
            check_value(field.name, field.type, getattr(self, field.name))
        check_keys(self.text, known=_TEXT, required=_TEXT)
        for key, kind in _TEXT.items():
            check_value(f"text.{key}", kind, self.text[key])
        counts = {name: len(getattr(self, name)) for name in ("exact", "shown", "given")}
        if not self.exact or len(set(counts.values())) > 1:
            raise ValueError(f"{counts} must be one for every question, and at least one.")

    @property
    def tally(self) -> Tally:
        """Sentences right, of all."""
        return Tally(sum(self.exact), len(self.exact))

    @property
    def tally_shown(self) -> Tally:
        """Sentences right, of those whose rules the examples show."""
        return _tally(self.exact, self.shown)

    @property
    def tally_lacking(self) -> Tally:
        """Sentences right, of those with a word that stands neither in the book nor in an example."""
        return _tally(self.exact, [not one for one in self.given])

    @property
    def tally_words(self) -> Tally:
        """Words right, of all."""
        return Tally(self.words_right, self.words_asked)


@dataclass(frozen=True, slots=True)
class LanguageRecord:
    """Rows, and where they were measured: device, versions, commit, date."""

    rows: tuple[LanguageRow, ...]
    environment: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write it as JSON, as a whole or not at all.

        Raises:
            ValueError: a number in `environment` that JSON does not have.
            OSError: as `moe.train.files.write_bytes`.
        """
        write_json(path, {"environment": self.environment, "rows": [asdict(row) for row in self.rows]})

    @classmethod
    def load(cls, path: Path) -> Self:
        """The inverse of `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or no record: names the file and the key that is wrong.
        """
        return cls(*read_record(path, LanguageRow, "an evaluation of languages"))


def merge(records: Iterable[LanguageRecord]) -> LanguageRecord:
    """One record with the rows of all, in order; a row that several of them hold stays once."""
    records = list(records)
    rows = list({repr(row): row for record in records for row in record.rows}.values())
    return LanguageRecord(tuple(rows), merge_environments(record.environment for record in records))


def pool(tallies: Iterable[Tally]) -> Tally:
    """All answers together."""
    tallies = list(tallies)
    return Tally(sum(one.right for one in tallies), sum(one.asked for one in tallies))


def _tally(exact: Iterable[bool], chosen: Iterable[bool]) -> Tally:
    right = [one for one, is_chosen in zip(exact, chosen, strict=True) if is_chosen]
    return Tally(sum(right), len(right))


_TEXT: dict[str, type] = TextFacts.__annotations__
