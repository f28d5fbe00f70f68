"""One figure of a training run, made from its folder alone: it can be drawn again at any time.

Needs matplotlib (the extra "train").
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe.checkpoint import read_json
from moe.report.style import BLUE, GREEN, GREY, ORANGE, STYLE
from moe.train.run_folder import RunFolder

LAST_INTERVALS = 5  # averaged in the heat map


def draw_run(folder: Path) -> Path:
    """Write figure.png into the run folder: bits per byte, balance over time, load of every expert.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: nothing was logged yet.
    """
    run = RunFolder(folder)
    config = run.read_config()
    train, validation = run.read_metrics("train"), run.read_metrics("eval")
    if not train:
        raise ValueError(f"{run.metrics_file} has no training interval yet; there is nothing to draw.")
    final = read_json(folder / "eval.json") if (folder / "eval.json").exists() else None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 7.6), layout="constrained")
        areas = figure.add_gridspec(2, 2, height_ratios=(1.35, 1))
        draw_learning(figure.add_subplot(areas[0, :]), train, validation, final)
        if train[-1]["load"]:
            draw_balance(figure.add_subplot(areas[1, 0]), train)
            moe_layers = [i for i in range(config.model.num_hidden_layers) if config.model.is_moe_layer(i)]
            draw_loads(figure, figure.add_subplot(areas[1, 1]), train, moe_layers)
        figure.suptitle(_title(run, train[-1]), fontsize=14, fontweight="bold")
        path = folder / "figure.png"
        figure.savefig(path, dpi=140)
    return path


def draw_learning(
    axes: Axes, train: list[dict[str, Any]], validation: list[dict[str, Any]], final: dict[str, Any] | None
) -> None:
    """Bits per byte against tokens seen, with gzip and xz as levels to pass."""
    axes.plot(
        _millions(train, "tokens"), _column(train, "bits_per_byte"), color=BLUE, alpha=0.55, label="training"
    )
    if validation:
        places, values = _millions(validation, "tokens_seen"), _column(validation, "bits_per_byte")
        axes.plot(places, values, "o-", color=ORANGE, label="validation (held-out files)")
    levels = _column(train, "bits_per_byte")[len(train) // 10 :]
    if final is not None:
        for name, style in (("gzip", "--"), ("xz", ":")):
            axes.axhline(final[name], color=GREY, linestyle=style, label=f"{name}: {final[name]:.2f}")
            levels.append(final[name])
        axes.plot(
            [train[-1]["tokens"] / 1e6],
            [final["bits_per_byte"]],
            "*",
            color=GREEN,
            markersize=15,
            label=f"this model, same bytes as gzip and xz: {final['bits_per_byte']:.2f}",
        )
        levels.append(final["bits_per_byte"])
    margin = 0.08 * (max(levels) - min(levels) or 1)
    axes.set_ylim(min(levels) - margin, max(levels) + margin)
    axes.set(title="Learning", xlabel="tokens seen (millions)", ylabel="bits per byte (lower is better)")
    axes.legend(loc="upper right", framealpha=0.9)


def draw_balance(axes: Axes, train: list[dict[str, Any]]) -> None:
    """The largest and the smallest load of each interval, over all layers, against tokens seen."""
    loads = np.array([record["load"] for record in train])  # (intervals l e)
    places = _millions(train, "tokens")
    axes.fill_between(places, loads.min((1, 2)), loads.max((1, 2)), color=BLUE, alpha=0.15)
    axes.plot(places, loads.max((1, 2)), color=BLUE, label="busiest expert")
    axes.plot(places, loads.min((1, 2)), color=ORANGE, label="idlest expert")
    axes.axhline(1, color=GREY, linestyle="--", label="ideal")
    axes.set(title="Balance of the experts", xlabel="tokens seen (millions)", ylabel="load / ideal load")
    axes.set_ylim(0, 1.3 * max(loads.max(), 1))
    axes.legend(loc="upper center", ncols=3, framealpha=0.9)


def draw_loads(figure: Figure, axes: Axes, train: list[dict[str, Any]], layers: list[int]) -> None:
    """Layers by experts at the end of the run; white is the ideal load, blue less, red more."""
    loads = np.mean([record["load"] for record in train[-LAST_INTERVALS:]], axis=0)  # (l e)
    reach = max(0.5, float(np.abs(loads - 1).max()))
    image = axes.imshow(
        loads,
        aspect="auto",
        cmap="RdBu_r",
        norm=TwoSlopeNorm(1, vmin=1 - reach, vmax=1 + reach),
        origin="lower",
    )
    axes.set(title="Load of each expert at the end", xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="load / ideal load")


def _title(run: RunFolder, last: dict[str, Any]) -> str:
    model = run.read_config().model
    experts = (
        f"{model.num_experts} experts, {model.num_experts_per_tok} a token" if model.num_experts else "dense"
    )
    size = f"{model.num_hidden_layers} layers of width {model.hidden_size}"
    return f"{run.path.resolve().name}: {size}, {experts}, step {last['step']}"


def _column(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records]


def _millions(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] / 1e6 for record in records]
