"""Figure of specialisation: which experts the slots of each label went to, a panel for every MoE layer.

Needs matplotlib (the extra "train").
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from moe.probes.specialisation.measure import LayerSpecialisation, Specialisation
from moe.probes.specialisation.record import SpecialisationRecord, untrained_range, verdict
from moe.report.style import STYLE
from moe.train.files import write_bytes

# White is the share that all labels together have; orange is more, blue less.
COLOURS = LinearSegmentedColormap.from_list("lift", ["#2b5c8a", "#ffffff", "#d1662a"])
MOST_WRITTEN = 16  # experts: up to so many, every cell shows its percentage
MANY_WIDTH = 6.5  # inches of a panel with more
WIDEST = 16.0  # inches of all panels beside one another
_REACH = 2.0  # of the colours: log2 of share / share of all, from a quarter to four times
_NORM = TwoSlopeNorm(0, vmin=-_REACH, vmax=_REACH)
_EMPTY, _HATCH = "#e4e4e4", "#b4b4b4"


def draw_specialisation(record: SpecialisationRecord, path: Path) -> Path:
    """Write `specialisation_figure` as a file, in the format that the suffix of `path` names, such as .png.

    Raises:
        ValueError: a format that matplotlib does not write.
    """
    figure = specialisation_figure(record.found, f"{record.run}, step {record.step}", record.untrained)
    content = BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, dpi=140, format=path.suffix.removeprefix(".") or "png")
    write_bytes(path, content.getvalue())
    return path


def specialisation_figure(
    found: Specialisation, title: str, untrained: Sequence[Specialisation] = ()
) -> Figure:
    """A heat map of labels by experts for every layer; above it the information, null and control."""
    experts, labels, layers = len(found.layers[0].load), len(found.labels), len(found.layers)
    panel = 1.0 + (0.42 * experts if experts <= MOST_WRITTEN else MANY_WIDTH)
    across = max(1, min(layers, int(WIDEST // panel)))
    down = -(-layers // across)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        width = max(7.0, 1.6 + across * panel)
        figure = Figure(figsize=(width, 1.3 + down * (1.5 + 0.42 * labels)), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False)
        for index, (axes, layer) in enumerate(zip(panels.flat, found.layers, strict=False)):
            draw_layer(axes, layer, found.labels, untrained_range(untrained, index))
        for axes in panels.flat[layers:]:
            axes.set_visible(False)
        bar = figure.colorbar(
            ScalarMappable(_NORM, COLOURS), ax=panels, shrink=0.9, label="share / share over all labels"
        )
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
        counts = ", ".join(f"{name} {n:,}" for name, n in zip(found.labels, found.tokens, strict=True))
        figure.suptitle(
            f"{title}: where the tokens go\ntokens: {counts}\n{verdict(found, untrained)}", fontsize=10
        )
    return figure


def draw_layer(
    axes: Axes,
    layer: LayerSpecialisation,
    labels: tuple[str, ...],
    untrained: str = "-",
) -> None:
    """One heat map: a row for each label, a column for each expert, in percent of the label's slots."""
    experts = len(layer.load)
    shares = np.array([np.full(experts, np.nan) if row is None else row for row in layer.shares])
    load = np.array(layer.load)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.ma.masked_invalid(np.clip(np.log2(shares / load), -_REACH, _REACH))
    axes.patch.set(facecolor=_EMPTY, edgecolor=_HATCH, hatch="///", linewidth=0)
    axes.pcolormesh(lift, cmap=COLOURS, norm=_NORM, edgecolors="white")
    if experts <= MOST_WRITTEN:
        for y, x in zip(*np.nonzero(~np.isnan(shares)), strict=True):
            strong = not lift.mask.any() and abs(lift[y, x]) > 0.75 * _REACH
            axes.text(
                x + 0.5,
                y + 0.5,
                _percent(float(shares[y, x])),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if strong else "black",
            )
    null = layer.by_block
    told = f"layer {layer.layer}: {layer.mutual_information:.4f} bits of {layer.label_entropy:.2f}"
    before = "" if untrained == "-" else f"; untrained {untrained}"
    shuffled = f"blocks {null.found:.4f}; shuffled 99 % below {null.quantile_99:.4f}, p {null.p_value:.2g}"
    axes.set_title(f"{told}{before}\n{shuffled}", fontsize=9)
    axes.set(xlabel="expert (numbers: % of the label's slots)", ylim=(len(labels), 0))
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels)
    step = 1 if experts <= MOST_WRITTEN else experts // 8
    axes.set_xticks(np.arange(0, experts, step) + 0.5, [str(x) for x in range(0, experts, step)])
    axes.tick_params(length=0)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 1 or percent == 0 else f"{percent:.1f}"
