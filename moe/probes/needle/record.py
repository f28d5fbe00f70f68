"""What an evaluation measured: plain data, kept as JSON. Tables and figures are made from it alone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypedDict, TypeVar

from moe.json_files import read_json
from moe.probes import statistics
from moe.probes.needle.haystack import QUINTILES
from moe.probes.needle.record_checks import check_keys, check_value, shorten
from moe.train.files import write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")


class Tally(NamedTuple):
    """How many answers were right, of how many."""

    right: int
    asked: int

    @property
    def recall(self) -> float:
        """The share that was right; NaN where nothing was asked."""
        return self.right / self.asked if self.asked else math.nan

    @property
    def lower_bound(self) -> float:
        """The exact one-sided 95 % bound of the recall (Clopper and Pearson); NaN where nothing was asked."""
        return statistics.lower_bound(self.right, self.asked) if self.asked else math.nan


class Model(NamedTuple):
    """Who was asked. Answers of different models are never pooled."""

    run: str
    step: int
    variant: str


class TextFacts(TypedDict):
    """The text around the needles: its folder, its SHA-256, how many files; whether it had to be repeated."""

    root: str
    digest: str
    files: int
    repeated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleRow:
    """All questions of one template, to one model, in haystacks of one length.

    Raises:
        ValueError: a value of another type or out of range, no question, or not one answer a question.
    """

    run: str
    step: int  # of its training
    total: int  # parameters
    active: int  # parameters that one token uses
    variant: str  # "", or what was changed, such as "shuffled values"
    length: int  # bytes of a haystack
    template: str
    haystacks: int
    needles: int  # in each haystack
    depths: tuple[float, ...]  # of every question: place of its needle / length
    correct: tuple[bool, ...]  # of every question: whether the whole answer was right
    prefill_seconds: float  # of a haystack, on average
    answer_seconds: float  # of all answers together
    cache_bytes: int
    peak_bytes: int  # 0: not measured
    path: str  # how the haystack was read and the questions were answered
    dtype: str  # of the cache
    text: TextFacts
    trained_length: int = 0  # bytes of the longest training sequence; 0: not known

    def __post_init__(self) -> None:
        for field in fields(self):
            check_value(field.name, field.type, getattr(self, field.name))
        check_keys(self.text, known=_TEXT, required=_TEXT)
        for key, kind in _TEXT.items():
            check_value(f"text.{key}", kind, self.text[key])
        if not self.correct:
            raise ValueError("correct is empty: a row needs at least one question.")
        if len(self.depths) != len(self.correct):
            raise ValueError(
                f"depths has {len(self.depths)} questions and correct has {len(self.correct)}: "
                f"give both for every question."
            )

    @property
    def tally(self) -> Tally:
        """`right` of `asked`, with their recall and its bound."""
        return Tally(sum(self.correct), len(self.correct))

    @property
    def asked(self) -> int:
        """How many questions."""
        return self.tally.asked

    @property
    def right(self) -> int:
        """How many were answered right."""
        return self.tally.right

    @property
    def recall(self) -> float:
        """right / asked."""
        return self.tally.recall

    @property
    def lower_bound(self) -> float:
        """The exact one-sided 95 % bound of the recall."""
        return self.tally.lower_bound

    @property
    def quintiles(self) -> list[Tally]:
        """What was right in each fifth of the depth, the first one at the beginning of the haystack."""
        return tally_by_depth([self], QUINTILES)

    @property
    def model(self) -> Model:
        """Whose answers these are."""
        return Model(self.run, self.step, self.variant)

    @property
    def questions(self) -> tuple[Any, ...]:
        """What was asked of whom: the same for two rows that differ in dtype, path, machine or luck only."""
        return *self.model, self.template, self.length, self.needles, self.depths, self.text["digest"]


@dataclass(frozen=True, slots=True)
class NeedleRecord:
    """Rows, and where they were measured: device, versions, commit, date."""

    rows: tuple[NeedleRow, ...]
    environment: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write it as JSON, as a whole or not at all.

        Raises:
            ValueError: a number in `environment` that JSON does not have.
            OSError: as `moe.train.files.write_bytes`.
        """
        write_json(path, {"environment": self.environment, "rows": [asdict(row) for row in self.rows]})

    @classmethod
    def row_type(cls) -> type[NeedleRow]:
        """What its rows are."""
        return NeedleRow

    @classmethod
    def load(cls, path: Path) -> Self:
        """The inverse of `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or no record: names the file and the key that is wrong.
        """
        return cls(*read_record(path, cls.row_type(), "a needle evaluation"))


def read_record(path: Path, row_type: type[Row], of: str) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """The rows and the environment of a JSON record of something, such as "a needle evaluation".

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or no record: names the file and the key that is wrong.
    """
    data = read_json(path)
    try:
        check_keys(data, known=("environment", "rows"), required=("environment", "rows"))
        check_value("environment", dict, data["environment"])
        if not isinstance(data["rows"], list):
            raise ValueError(f"rows={shorten(data['rows'])} must be a list.")
        rows = tuple(_row(row_type, row, f"rows[{i}]") for i, row in enumerate(data["rows"]))
    except ValueError as error:
        raise ValueError(f"{path} is not a record of {of}: {error} Evaluate again.") from None
    return rows, data["environment"]


def merge(records: Sequence[NeedleRecord]) -> NeedleRecord:
    """One record with the rows of all, in order, of the first one's kind; a row of several stays once."""
    rows: list[NeedleRow] = []
    for record in records:
        rows += [row for row in record.rows if row not in rows]
    kind = type(records[0]) if records else NeedleRecord
    return kind(tuple(rows), merge_environments(record.environment for record in records))


def merge_environments(environments: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What all agree on stays; where they differ, a list of all different values."""
    found: dict[str, list[Any]] = {}
    for environment in environments:
        for key, value in environment.items():
            found.setdefault(key, []).append(value)
    return {key: _common(values) for key, values in found.items()}


def ask_once(rows: Iterable[NeedleRow]) -> list[NeedleRow]:
    """The rows whose questions differ; of those that asked the same questions again, the last one.

    To pool without counting a question twice.
    """
    return list({row.questions: row for row in rows}.values())


def tally(rows: Iterable[NeedleRow]) -> Tally:
    """All answers of some rows together."""
    rows = list(rows)
    return Tally(sum(row.right for row in rows), sum(row.asked for row in rows))


def tally_by_depth(rows: Iterable[NeedleRow], parts: int) -> list[Tally]:
    """The answers of some rows in each of `parts` equal parts of the depth; depth 1 belongs to the last."""
    answers: list[list[bool]] = [[] for _ in range(parts)]
    for row in rows:
        for depth, correct in zip(row.depths, row.correct, strict=True):
            answers[min(int(depth * parts), parts - 1)].append(correct)
    return [Tally(sum(part), len(part)) for part in answers]


_TEXT: dict[str, type] = TextFacts.__annotations__


def _row(kind: type[Row], data: Any, where: str) -> Row:
    check_value(where, dict, data)
    known = {field.name: field for field in fields(kind)}
    required = [name for name, field in known.items() if field.default is MISSING]
    try:
        check_keys(data, known=known, required=required)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _common(values: list[Any]) -> Any:
    """The value, if all are the same; else all different ones, those of lists among them."""
    if all(value == values[0] for value in values):
        return values[0]
    different: list[Any] = []
    for value in values:
        different += [one for one in (value if isinstance(value, list) else [value]) if one not in different]
    return different
