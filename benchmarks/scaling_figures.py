"""Two figures from the JSON of benchmarks.scaling: cost against total parameters, and loss against them.

Needs matplotlib (the extra "train").
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.measure import digits
from benchmarks.record import headline
from benchmarks.scaling_learning import DENSE
from benchmarks.scaling_verdicts import compared, losses, sparse_arms

BLUE, ORANGE, GREEN, GREY = "#2b5c8a", "#d1662a", "#3c7a4e", "#8a8a8a"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
MODES = {
    "forward": ("forward", BLUE),
    "forward_backward": ("forward + backward", ORANGE),
    "decode": ("decode one token", GREEN),
}


def draw_cost(record: dict[str, Any], path: Path) -> Path:
    """Parameters, and time as multiples of the dense decoder of equal active FLOPs, against experts."""
    dense, *others = record["cost"]["models"]
    models = [model for model in others if model["backend"] != "reference"]
    backend = models[-1]["backend"]
    models = [model for model in models if model["backend"] == backend]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_sizes(left, models)
        _draw_times(right, models, dense)
        figure.suptitle(
            f"Total parameters grow, active stay: what a token costs ({backend} backend)", fontweight="bold"
        )
        figure.supxlabel(headline(record["environment"]), fontsize=8, color=GREY)
        figure.savefig(path, dpi=140)
    return path


def _draw_sizes(axes: Axes, models: list[dict[str, Any]]) -> None:
    experts = [model["experts"] for model in models]
    axes.plot(experts, [model["total"] / 1e6 for model in models], "o-", color=BLUE, label="total parameters")
    axes.plot(
        experts, [model["active"] / 1e6 for model in models], "o-", color=ORANGE, label="active parameters"
    )
    axes.set_yscale("log")
    _plain_log(axes.yaxis)
    axes.set_ylabel("parameters, millions")
    _experts_axis(axes, experts)
    axes.set_title("Size")
    axes.legend()


def _draw_times(axes: Axes, models: list[dict[str, Any]], dense: dict[str, Any]) -> None:
    for mode, (words, color) in MODES.items():
        measured = [model for model in models if mode in model["timings"]]
        unit = dense["timings"][mode]["ms"]
        levels = [[model["timings"][mode][q] / unit for model in measured] for q in ("p20", "ms", "p80")]
        experts = [model["experts"] for model in measured]
        axes.plot(experts, levels[1], "o-", color=color, label=f"{words} (dense: {digits(unit)} ms)")
        axes.fill_between(experts, levels[0], levels[2], color=color, alpha=0.15, linewidth=0)
    totals = [model["total"] / dense["total"] for model in models]
    axes.plot([model["experts"] for model in models], totals, ":", color=GREY, label="total parameters")
    axes.axhline(1, color="black", linewidth=1)
    axes.annotate(
        "dense, equal active FLOPs", (1, 1), xycoords=("axes fraction", "data"), xytext=(-4, -13),
        textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], labels=["0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_ylim(0.5, max(2, 1.3 * max(totals)))
    axes.set_ylabel("multiple of the dense decoder")
    _experts_axis(axes, [model["experts"] for model in models])
    axes.set_title("Time of a token (band: p20 to p80)")
    axes.legend(loc="upper left", fontsize=10)


def _experts_axis(axes: Axes, experts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(experts, labels=[str(e) for e in experts])
    axes.set_xlabel("experts a layer")


def _plain_log(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_learning(record: dict[str, Any], path: Path) -> Path:
    """Loss against total parameters, seeds as dots; and each seed's difference to dense."""
    learning = record["learning"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_losses(left, learning)
        _draw_differences(right, learning)
        active = learning["arms"][DENSE]["non_embedding_active"] / 1e3
        figure.suptitle(
            f"Loss against total parameters at equal active parameters ({active:.0f}k without embedding)",
            fontweight="bold",
        )
        figure.supxlabel(headline(record["environment"]), fontsize=8, color=GREY)
        figure.savefig(path, dpi=140)
    return path


def _draw_losses(axes: Axes, learning: dict[str, Any]) -> None:
    by_arm, claimed = losses(learning), [DENSE, *sparse_arms(learning)]
    totals = {arm: learning["arms"][arm]["total"] / 1e6 for arm in by_arm}
    means = [statistics.fmean(by_arm[arm].values()) for arm in claimed]
    axes.plot(
        [totals[arm] for arm in claimed],
        means,
        "-",
        color=BLUE,
        label="equal active parameters: mean of seeds",
    )
    for seed in by_arm[DENSE]:
        paired = [arm for arm in claimed if seed in by_arm[arm]]
        by_seed = [by_arm[arm][seed] for arm in paired]
        axes.plot([totals[arm] for arm in paired], by_seed, "-", color=BLUE, alpha=0.2, linewidth=1)
    for arm, by_seed in by_arm.items():
        color, marker = _look(learning, arm)
        seeds = [totals[arm]] * len(by_seed), list(by_seed.values())
        label = None if arm in claimed else arm
        axes.plot(*seeds, marker, color=color, alpha=0.7, markersize=5, label=label)
        if arm in claimed:
            axes.annotate(
                arm, (totals[arm], max(by_seed.values())), xytext=(0, 8), textcoords="offset points",
                ha="center", fontsize=9, color=color,
            )  # fmt: skip
    axes.set_xscale("log")
    _plain_log(axes.xaxis)
    axes.margins(x=0.14, y=0.2)
    axes.set_xlabel("total parameters, millions")
    axes.set_ylabel("validation loss, nats a byte")
    axes.set_title("Loss on held-out files (dots: seeds, thin lines: pairs)")
    axes.legend(loc="upper right", fontsize=9)


def _look(learning: dict[str, Any], arm: str) -> tuple[str, str]:
    """Colour and marker: circles for the claim, squares for the larger dense decoder, triangles for e = k."""
    if arm in (DENSE, *sparse_arms(learning)):
        return BLUE, "o"
    return (GREY, "^") if learning["arms"][arm]["experts"] else (ORANGE, "s")


def _draw_differences(axes: Axes, learning: dict[str, Any]) -> None:
    by_arm, pairs = losses(learning), compared(learning)
    arms = [arm for arm in by_arm if arm != DENSE]
    for place, arm in enumerate(arms):
        differences = [loss - by_arm[DENSE][seed] for seed, loss in by_arm[arm].items()]
        color, marker = _look(learning, arm)
        spread = [place + 0.04 * (i - (len(differences) - 1) / 2) for i in range(len(differences))]
        axes.plot(spread, differences, marker, color=color, alpha=0.7, markersize=5)
        if arm in pairs:
            half = pairs[arm]["half_width"] if pairs[arm]["pairs"] > 2 else None
            axes.errorbar(
                place + 0.25, -pairs[arm]["mean"], yerr=half, fmt="_", color=color, capsize=4, markersize=12
            )
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(len(arms)), labels=[arm.replace(", ", ",\n") for arm in arms], fontsize=9)
    axes.set_xlim(-0.5, len(arms) - 0.3)
    axes.set_ylabel("loss - dense loss of the same seed, nats a byte")
    axes.set_title("Paired differences (bar: mean, 95 % from 3 pairs up)")
