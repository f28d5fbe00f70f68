"""An evaluation of languages as text: conditions down, numbers of examples across.

Shares and bounds are cut off after one decimal place, never rounded up.
"""

from collections.abc import Callable, Iterable

from moe.doctor import table
from moe.probes.language.exam import CONDITIONS
from moe.probes.language.record import LanguageRecord, LanguageRow, pool
from moe.probes.needle.record import Tally
from moe.probes.needle.table import ABSENT, format_count, format_length, format_percent, headline

SHOWN = "... whose rules the examples show"
LACKING = "... with a word that is nowhere in the context"


def language_table(record: LanguageRecord) -> list[str]:
    """Lines of Markdown: machine and commit, then for each run two tables, of whole sentences and of words.

    A cell is right/asked with the one-sided 95 % bound of its share: from below, or from above where no more
    than one in twenty is right.
    """
    lines = headline(record.environment)
    for run in dict.fromkeys((row.run, row.step) for row in record.rows):
        rows = [row for row in record.rows if (row.run, row.step) == run]
        lines += ["", describe(rows), "", *sentences_table(rows), "", *words_table(rows)]
    return lines


def describe(rows: Iterable[LanguageRow]) -> str:
    """One line: whose answers these are, and how they were asked."""
    rows = list(rows)
    row = rows[0]
    counts = {(one.languages, len(one.exact)) for one in rows}
    asked = " or ".join(f"{n} questions about {languages} languages" for languages, n in sorted(counts))
    letters = " and ".join(sorted({one.letters for one in rows}))
    repeated = "; REPEATED text" if any(one.text["repeated"] for one in rows) else ""
    return (
        f"{row.run}, step {row.step}: {format_count(row.total)} parameters, "
        f"{format_count(row.active)} active; "
        f"words of {letters} bytes; in a cell {asked}; {row.path}; {row.dtype}{repeated}"
    )


def sentences_table(rows: Iterable[LanguageRow]) -> list[str]:
    """Exact match of whole sentences."""
    rows = list(rows)
    examples = sorted({row.examples for row in rows})
    lines: list[tuple[str, ...]] = []
    for words, filler, condition in _settings(rows):
        here = {row.examples: row for row in rows if _setting(row) == (words, filler, condition)}
        head = (str(words), format_filler(filler), condition)
        lines.append((*head, *_cells(here, examples, lambda row: row.tally)))
        has_grammar, entries = CONDITIONS[condition]
        if not has_grammar and entries:
            lines.append(("", "", SHOWN, *_cells(here, examples, lambda row: row.tally_shown)))
        if entries < 1:
            lines.append(("", "", LACKING, *_cells(here, examples, lambda row: row.tally_lacking)))
    return table(_head("whole sentences", examples), lines)


def words_table(rows: Iterable[LanguageRow]) -> list[str]:
    """Words right after right ones, in per cent."""
    rows = list(rows)
    examples = sorted({row.examples for row in rows})
    lines = []
    for words, filler, condition in _settings(rows):
        here = {row.examples: row for row in rows if _setting(row) == (words, filler, condition)}
        cells = (format_percent(here[k].tally_words.recall) if k in here else ABSENT for k in examples)
        lines.append((str(words), format_filler(filler), condition, *cells))
    return table(_head("words, %", examples), lines)


def pooled(rows: Iterable[LanguageRow]) -> dict[tuple[int, int, str, int], Tally]:
    """Sentences right by words, filler, condition and examples, over all runs."""
    groups: dict[tuple[int, int, str, int], list[Tally]] = {}
    for row in rows:
        groups.setdefault((*_setting(row), row.examples), []).append(row.tally)
    return {key: pool(tallies) for key, tallies in groups.items()}


def format_tally(found: Tally) -> str:
    """Such as "199/200 ≥ 97.6", or "0/200 ≤ 1.5"; "-" where nothing was asked."""
    if not found.asked:
        return ABSENT
    if found.recall > 0.05:
        return f"{found.right}/{found.asked} ≥ {format_percent(found.lower_bound)}"
    most = 1 - Tally(found.asked - found.right, found.asked).lower_bound
    return f"{found.right}/{found.asked} ≤ {100 * most + 0.05:.1f}"  # rounded up


def format_filler(size: int) -> str:
    """0, or a length such as 64k."""
    return format_length(size) if size else "0"


def _head(what: str, examples: list[int]) -> tuple[str, ...]:
    return "dictionary", "filler", what, *(f"{k} examples" for k in examples)


def _settings(rows: list[LanguageRow]) -> list[tuple[int, int, str]]:
    order = list(CONDITIONS)
    return sorted({_setting(row) for row in rows}, key=lambda one: (one[0], one[1], order.index(one[2])))


def _setting(row: LanguageRow) -> tuple[int, int, str]:
    return row.words, row.filler, row.condition


def _cells(
    here: dict[int, LanguageRow], examples: list[int], tally: Callable[[LanguageRow], Tally]
) -> list[str]:
    return [format_tally(tally(here[k])) if k in here else ABSENT for k in examples]
