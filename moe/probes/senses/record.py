"""What an evaluation of needles of every sense measured: rows as of text, and how digits were read."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moe.json_files import read_json
from moe.probes.needle.record import NeedleRecord, NeedleRow, Tally


@dataclass(frozen=True, kw_only=True, slots=True)
class SensesRow(NeedleRow):
    """All questions of one modality (`template`), to one model, in haystacks of one length (in tokens).

    Raises:
        ValueError: as `NeedleRow`, or counts that do not belong to these questions.
    """

    digits: int  # of an answer
    digits_right: tuple[int, ...]  # of every question: how many digits of its answer
    near_digits_right: tuple[int, ...]  # the same with the needle 64 tokens away; empty: not asked
    frames: int  # tokens that show one digit
    source: str  # what is seen or heard

    def __post_init__(self) -> None:
        NeedleRow.__post_init__(self)
        for name in ("digits_right", "near_digits_right"):
            counts = getattr(self, name)
            if len(counts) != self.asked and (name == "digits_right" or counts):
                raise ValueError(
                    f"{name} has {len(counts)} numbers and correct has {self.asked}: one for each."
                )
            if any(count > self.digits for count in counts):
                raise ValueError(f"{name} has a number over digits={self.digits}.")
        if [count == self.digits for count in self.digits_right] != list(self.correct):
            raise ValueError("digits_right and correct contradict each other.")

    @property
    def per_digit(self) -> Tally:
        """Digits of all answers."""
        return Tally(sum(self.digits_right), self.digits * self.asked)

    @property
    def near(self) -> Tally:
        """Answers with all digits right, the needle 64 tokens away."""
        return Tally(
            sum(count == self.digits for count in self.near_digits_right), len(self.near_digits_right)
        )

    @property
    def normalised(self) -> float:
        """Recall over that of the same needles 64 tokens away: finding apart from reading; NaN: not asked."""
        return normalise([self])


@dataclass(frozen=True, slots=True)
class SensesRecord(NeedleRecord):
    """Rows that are `SensesRow`, and where they were measured."""

    rows: tuple[SensesRow, ...]

    @classmethod
    def row_type(cls) -> type[NeedleRow]:
        """`SensesRow`."""
        return SensesRow


def normalise(rows: Iterable[SensesRow]) -> float:
    """The recall of all rows together over their recall 64 tokens away; NaN where that was not asked."""
    rows = list(rows)
    near = sum(row.near.right for row in rows)
    return sum(row.right for row in rows) / near if near else float("nan")


def load_record(path: Path) -> NeedleRecord:
    """A record of text needles, or of needles in every sense, whichever the file holds.

    Raises:
        FileNotFoundError, ValueError: as `NeedleRecord.load`.
    """
    data = read_json(path)
    rows = data.get("rows") if isinstance(data, dict) else None
    is_senses = isinstance(rows, list) and any(isinstance(row, dict) and "frames" in row for row in rows)
    return (SensesRecord if is_senses else NeedleRecord).load(path)
