"""An evaluation of needles of every sense as text: the table of text needles, and how digits were read."""

import math
from collections import defaultdict
from typing import Any

from moe.doctor import table
from moe.probes.needle.record import ask_once
from moe.probes.needle.table import (
    ABSENT,
    HEAD,
    cells,
    format_percent,
    headline,
    model_names,
    paths,
)
from moe.probes.needle.table import verdict as verdict_of
from moe.probes.senses.record import SensesRecord, SensesRow, normalise

_OWN = ("per digit %", "near %", "normalised %")  # after the bound of the recall
_AFTER = HEAD.index(">= %") + 1


def senses_table(record: SensesRecord) -> list[str]:
    """Lines of Markdown: machine and commit, the table, what is seen and heard, how each model was asked.

    "near" is the recall of the same needles 64 tokens away, "normalised" the recall over it. Tokens are
    bytes of text, 8 x 8 pixels of an image or a video frame, or frames of sound.
    """
    names = model_names(record.rows)
    head = ["modality" if word == "template" else word for word in HEAD]
    rows = [_row(row, names[row.model]) for row in record.rows]
    lines = table((*head[:_AFTER], *_OWN, *head[_AFTER:]), rows)
    shown = {
        row.template: f"{row.template}: {row.source}, {row.frames} tokens a digit" for row in record.rows
    }
    return [*headline(record.environment), *lines, "", *shown.values(), "", *paths(record.rows, names)]


def senses_verdicts(record: SensesRecord) -> list[str]:
    """One line for each model, modality and length, over all their rows, in the order of the rows."""
    names = model_names(record.rows)
    groups: dict[tuple[Any, ...], list[SensesRow]] = defaultdict(list)
    for row in ask_once(record.rows):
        assert isinstance(row, SensesRow), "a SensesRecord has no others"
        groups[row.model, row.template, row.length].append(row)
    return [
        (f"{names[model]}: " if len(names) > 1 else "") + _verdict(rows)
        for (model, *_), rows in groups.items()
    ]


def _verdict(rows: list[SensesRow]) -> str:
    digits = sum(row.per_digit.right for row in rows), sum(row.per_digit.asked for row in rows)
    return (
        f"{verdict_of(*rows)}; {digits[0]}/{digits[1]} digits = {format_percent(digits[0] / digits[1])} %; "
        f"normalised {_percent(normalise(rows))} %"
    )


def _row(row: SensesRow, name: str) -> tuple[str, ...]:
    known = (name, *cells(row))
    own = (format_percent(row.per_digit.recall), format_percent(row.near.recall), _percent(row.normalised))
    return (*known[:_AFTER], *own, *known[_AFTER:])


def _percent(share: float) -> str:
    """A share that may be over 1; "-" for NaN."""
    return ABSENT if math.isnan(share) else format_percent(share)
