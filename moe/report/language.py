"""The figure of an evaluation of languages: exact match by number of examples, and by filler.

Needs matplotlib (the extra "train").
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.probes.language.exam import BOTH, CONDITIONS, DICTIONARY
from moe.probes.language.record import LanguageRecord, LanguageRow, pool
from moe.probes.language.table import format_filler
from moe.probes.needle.record import Tally
from moe.probes.needle.table import format_count, format_length
from moe.report.style import BLUE, GREEN, GREY, ORANGE, STYLE
from moe.train.files import write_bytes

_COLOURS = dict(zip(CONDITIONS, (BLUE, ORANGE, GREEN, "#8d5a97", GREY), strict=True))
_MARKERS = dict(zip(CONDITIONS, "os^Dv", strict=True))


def draw_languages(record: LanguageRecord, path: Path) -> Path:
    """Write `language_figure` as a file, in the format that the suffix of `path` names, such as .png.

    Raises:
        ValueError: as `language_figure`, or a format that matplotlib does not write.
    """
    figure, content = language_figure(record), BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, dpi=140, format=path.suffix.removeprefix(".") or "png")
    write_bytes(path, content.getvalue())
    return path


def language_figure(record: LanguageRecord) -> Figure:
    """Left, by number of examples without filler; right, by filler, with the most examples.

    Runs are pooled; a small dot is one run. Bars reach down to the one-sided 95 % bound. Of the sizes of
    dictionary, the smallest is drawn.

    Raises:
        ValueError: the record has no row.
    """
    if not record.rows:
        raise ValueError("the record has no row to draw. Evaluate something.")
    words = min(row.words for row in record.rows)
    rows = [row for row in record.rows if row.words == words]
    fillers = sorted({row.filler for row in rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_examples(left, [row for row in rows if row.filler == fillers[0]])
        left.set_title(f"By number of examples, {_words(fillers[0])}")
        draw_fillers(right, rows)
        right.set_title("By filler around book and examples")
        figure.suptitle(_describe(rows))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_examples(axes: Axes, rows: Sequence[LanguageRow]) -> None:
    """A line for each condition; for the dictionary alone also of sentences whose rules were shown."""
    counts = sorted({row.examples for row in rows})
    places = {count: place for place, count in enumerate(counts)}
    for condition in _conditions(rows):
        mine = [row for row in rows if row.condition == condition]
        _draw_line(axes, mine, places, "examples", condition)
        if condition == DICTIONARY:
            _draw_line(axes, mine, places, "examples", condition, only_shown=True)
    _finish(axes, list(map(str, counts)), "examples in the context")


def draw_fillers(axes: Axes, rows: Sequence[LanguageRow]) -> None:
    """A line for each condition, with the most examples that were asked at every filler that it has."""
    fillers = sorted({row.filler for row in rows})
    places = {filler: place for place, filler in enumerate(fillers)}
    counts: set[int] = set()
    for condition in _conditions(rows):
        mine = [row for row in rows if row.condition == condition]
        there = ({row.examples for row in mine if row.filler == f} for f in fillers)
        common = set.intersection(*filter(None, there))
        chosen = [row for row in mine if row.examples == max(common, default=None)]
        if chosen and len({row.filler for row in chosen}) > 1:
            _draw_line(axes, chosen, places, "filler", condition)
            counts.add(chosen[0].examples)
    examples = f"; {' or '.join(map(str, sorted(counts)))} examples" if counts else ""
    _finish(axes, [format_filler(f) for f in fillers], f"filler (bytes){examples}")


def _draw_line(
    axes: Axes,
    rows: Sequence[LanguageRow],
    places: dict[int, int],
    across: str,
    condition: str,
    *,
    only_shown: bool = False,
) -> None:
    def tally(row: LanguageRow) -> Tally:
        return row.tally_shown if only_shown else row.tally

    found = {}
    for value, place in places.items():
        here = [tally(row) for row in rows if getattr(row, across) == value]
        if here and pool(here).asked:
            found[place] = pool(here)
            several = [one for one in here if one.asked] if len({row.run for row in rows}) > 1 else []
            dots = [100 * one.recall for one in several]
            axes.plot([place] * len(dots), dots, ".", color=_COLOURS[condition], alpha=0.4, markersize=5)
    label = f"{condition}, sentences whose rules were shown" if only_shown else condition
    recall = [100 * one.recall for one in found.values()]
    below = [100 * (one.recall - one.lower_bound) for one in found.values()]
    axes.errorbar(
        list(found),
        recall,
        yerr=[below, [0] * len(below)],
        fmt=("--" if only_shown else "-") + _MARKERS[condition],
        color=_COLOURS[condition],
        capsize=2,
        markersize=5,
        label=label,
    )


def _finish(axes: Axes, labels: list[str], what: str) -> None:
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel=what, ylabel="whole sentences right (%)", ylim=(-3, 104))


def _conditions(rows: Sequence[LanguageRow]) -> list[str]:
    there = {row.condition for row in rows}
    return [condition for condition in CONDITIONS if condition in there]


def _describe(rows: Sequence[LanguageRow]) -> str:
    row, runs = rows[0], len({one.run for one in rows})
    seeds = f"{runs} runs pooled, a dot is one of them" if runs > 1 else row.run
    both = pool(one.tally for one in rows if one.condition == BOTH)
    size = f"{format_count(row.total)} parameters, {format_count(row.active)} active"
    found = f"; {BOTH}: {both.right}/{both.asked}" if both.asked else ""
    return (
        f"A language of {row.words} words of {row.letters} bytes, learnt from the context: {size}\n"
        f"{seeds}{found}; bars: one-sided 95 % bound"
    )


def _words(filler: int) -> str:
    return "no filler" if not filler else f"{format_length(filler)} bytes of filler"
