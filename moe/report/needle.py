"""Figures of a needle evaluation: recall by length and depth, and loss by length of context.

Needs matplotlib (the extra "train").
"""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moe.probes.needle.positions import ContextLoss
from moe.probes.needle.record import Model, NeedleRecord, NeedleRow, Tally, ask_once, tally, tally_by_depth
from moe.probes.needle.table import format_count, format_length, format_percent, model_names
from moe.report.style import BLUE, GREEN, GREY, ORANGE, STYLE
from moe.train.files import write_bytes

# Red and green look alike to one man in twelve; red, orange and blue do not. The pale point at 0.9 makes the
# last tenth, where good models differ, as visible as the half below it.
RECALL_COLOURS = LinearSegmentedColormap.from_list(
    "recall", [(0, "#8f1d2c"), (0.5, "#e5823c"), (0.9, "#fbe6ad"), (1, "#3f7fb3")]
)
FEW_CELLS = 60  # up to so many in a panel, every cell shows its numbers; beyond, those with a miss
_COLOUR_OF = ScalarMappable(Normalize(0, 1), RECALL_COLOURS)
_EMPTY, _HATCH = "#e4e4e4", "#b4b4b4"
_LINES = (BLUE, ORANGE, GREEN, GREY)


def draw_needles(
    record: NeedleRecord, path: Path, *, variant: str = "", depths: int = 10, unit: str = "bytes"
) -> Path:
    """Write `needle_figure` as a file, in the format that the suffix of `path` names, such as .png.

    Raises:
        ValueError: as `needle_figure`, or a format that matplotlib does not write.
    """
    return save_figure(needle_figure(record, variant=variant, depths=depths, unit=unit), path)


def needle_figure(
    record: NeedleRecord, *, variant: str = "", depths: int = 10, unit: str = "bytes"
) -> Figure:
    """Recall by length (across, one step each) and depth (down), as in Gemini 1.5's Figure 8 (2403.05530).

    One row of panels for each model, one column for each template. A panel has `depths` cells for each
    length; cells without questions are grey and hatched. Of the record, only the rows of `variant` are drawn,
    and questions that were asked again count once.

    Raises:
        ValueError: no row of this variant, or `depths` below 1.
    """
    rows = _choose(record, variant, depths)
    names = model_names(rows)
    templates = list(dict.fromkeys(row.template for row in rows))
    lengths = sorted({row.length for row in rows})
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        width = max(7.5, 1.5 + len(templates) * max(2.6, 0.6 + 0.85 * len(lengths)))
        height = 0.9 + len(names) * (1.3 + max(2.5, 0.3 * depths))
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(len(names), len(templates), squeeze=False)
        for across, (model, name) in zip(panels, names.items(), strict=True):
            for axes, template in zip(across, templates, strict=True):
                chosen = [row for row in rows if row.model == model and row.template == template]
                draw_panel(axes, chosen, lengths, depths=depths, unit=unit)
                found = _share(tally(chosen)) if chosen else "not asked"
                what = f"{name}, {template}" if len(names) > 1 else template
                axes.set_title(f"{what}\n{found}")  # on one line, titles of narrow panels run into each other
        bar = figure.colorbar(_COLOUR_OF, ax=panels, shrink=0.8, label="recall in a cell (right / asked)")
        bar.set_ticks([0, 0.25, 0.5, 0.75, 0.9, 1])
        figure.suptitle("\n".join(_describe(model, name, rows, unit) for model, name in names.items()))
    return figure


def draw_panel(
    axes: Axes, rows: Sequence[NeedleRow], lengths: Sequence[int], *, depths: int, unit: str = "bytes"
) -> None:
    """One heat map with a column for each of `lengths`, which count `unit`; depth 0 at the top."""
    cells = [tally_by_depth([row for row in rows if row.length == n], depths) for n in lengths]
    recall = np.ma.masked_invalid(
        [[cell.recall for cell in column] for column in cells]
    ).T  # (depths lengths)
    axes.patch.set(facecolor=_EMPTY, edgecolor=_HATCH, hatch="///", linewidth=0)
    edges = np.linspace(0, 100, depths + 1)
    axes.pcolormesh(
        np.arange(len(lengths) + 1),
        edges,
        recall,
        cmap=RECALL_COLOURS,
        vmin=0,
        vmax=1,
        edgecolors="white",
    )
    middles = (edges[1:] + edges[:-1]) / 2
    for column, tallies in enumerate(cells):
        for middle, cell in zip(middles, tallies, strict=True):
            if cell.asked and (cell.right < cell.asked or len(lengths) * depths <= FEW_CELLS):
                _write_cell(axes, column + 0.5, float(middle), cell)
    axes.set(xlabel=f"length of the haystack ({unit})", ylabel="depth of the needle (%)", ylim=(100, 0))
    axes.set_xticks(np.arange(len(lengths)) + 0.5, [_column_label(rows, n) for n in lengths], fontsize=8)
    axes.set_yticks(range(0, 101, 20))
    axes.tick_params(length=0)


def draw_positions(losses: Mapping[str, Sequence[ContextLoss]], path: Path) -> Path:
    """Write a figure of the loss by length of context, a line for each name, bars of one standard error.

    Raises:
        ValueError: no loss, a context below 0, a number that is not finite, or as `draw_needles`.
    """
    _check_losses(losses)
    contexts = sorted({one.context for line in losses.values() for one in line})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, line) in enumerate(losses.items()):
            ordered = sorted(line, key=lambda one: one.context)
            axes.errorbar(
                [one.context for one in ordered],
                [one.loss for one in ordered],
                yerr=[one.stderr for one in ordered],
                fmt="o-",
                color=_LINES[number % len(_LINES)],
                capsize=3,
                label=name,
            )
        least = next((context for context in contexts if context), 1)
        axes.set_xscale("symlog", base=2, linthresh=least)  # so that no context, 0, has a place
        axes.set_xticks(contexts, [format_length(n) if n else "0" for n in contexts], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="bytes before (log scale)", ylabel="loss (nats a byte; bars: one standard error)")
        axes.set_title("Loss by length of context: it must not rise")
        if len(losses) > 1:
            axes.legend()
    return save_figure(figure, path)


def _choose(record: NeedleRecord, variant: str, depths: int) -> list[NeedleRow]:
    if depths < 1:
        raise ValueError(f"depths={depths} must be at least 1: it is the number of cells of a length.")
    rows = ask_once(row for row in record.rows if row.variant == variant)
    if not rows:
        there = sorted({row.variant for row in record.rows})
        raise ValueError(f"the record has no row of variant={variant!r} to draw; its variants: {there}.")
    return rows


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a whole or not at all."""
    content = BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, dpi=140, format=path.suffix.removeprefix(".") or "png")
    write_bytes(path, content.getvalue())
    return path


def _write_cell(axes: Axes, x: float, y: float, cell: Tally) -> None:
    red, green, blue, _ = RECALL_COLOURS(cell.recall)
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
    colour = "white" if is_dark else "black"
    axes.text(x, y, f"{cell.right}/{cell.asked}", ha="center", va="center", fontsize=7.5, color=colour)


def _column_label(rows: Sequence[NeedleRow], length: int) -> str:
    """The length, and what all its cells prove together."""
    rows = [row for row in rows if row.length == length]
    if not rows:
        return format_length(length)
    found = tally(rows)
    lines = [
        format_length(length),
        f"{found.right}/{found.asked}",
        f"≥ {format_percent(found.lower_bound)} %",
    ]
    return "\n".join([*lines, "repeated text"] if any(row.text["repeated"] for row in rows) else lines)


def _share(found: Tally) -> str:
    return (
        f"{found.right}/{found.asked} = {format_percent(found.recall)} % "
        f"(≥ {format_percent(found.lower_bound)} %)"
    )


def _describe(model: Model, name: str, rows: Sequence[NeedleRow], unit: str) -> str:
    rows = [row for row in rows if row.model == model]
    size = f"{format_count(rows[0].total)} parameters, {format_count(rows[0].active)} active"
    longest = rows[0].trained_length
    trained = f", trained on sequences of {longest:,} {unit}" if longest else ""
    return f"{name}: {size}{trained}\n{_share(tally(rows))}, one-sided 95 % bound"


def _check_losses(losses: Mapping[str, Sequence[ContextLoss]]) -> None:
    if not losses or not all(losses.values()):
        raise ValueError("there is no loss to draw: give at least one ContextLoss for each name.")
    for name, line in losses.items():
        for i, one in enumerate(line):
            if one.context < 0:
                raise ValueError(f"{name}: losses[{i}] has context={one.context}, which must be at least 0.")
            if not (math.isfinite(one.loss) and 0 <= one.stderr < math.inf):
                raise ValueError(
                    f"{name}: losses[{i}] has loss={one.loss}, stderr={one.stderr}: "
                    f"both must be finite, and stderr at least 0."
                )
