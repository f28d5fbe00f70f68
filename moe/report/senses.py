"""A picture of needles that were found: the question, the frames or the spectrogram of the value, the answer.

Needs matplotlib (the extra "train").
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.modality_config import Modality
from moe.probes.needle.table import format_length
from moe.probes.senses.evaluate import FoundNeedle
from moe.probes.senses.handwriting import SIDE
from moe.report.needle import save_figure
from moe.report.style import GREEN, ORANGE, STYLE

_HEIGHTS = {Modality.TEXT: 0.8, Modality.IMAGE: 1.1, Modality.VIDEO: 1.1, Modality.AUDIO: 1.5}
_MEL_BANDS = slice(0, 40)  # of the features of an audio frame, the rest of which is padding
_TITLES = {
    Modality.TEXT: "text",
    Modality.IMAGE: "images, a strip of patches for each digit",
    Modality.VIDEO: "video, frames one after another",
    Modality.AUDIO: "sound, log-mel frames",
}


def draw_found(found: Sequence[FoundNeedle], path: Path) -> Path:
    """Write `found_figure` as a file, in the format that the suffix of `path` names, such as .png.

    Raises:
        ValueError: no needle, or a format that matplotlib does not write.
    """
    return save_figure(found_figure(found), path)


def found_figure(found: Sequence[FoundNeedle]) -> Figure:
    """A row for each needle: its value as it lies in the haystack, over the question and what was answered.

    Raises:
        ValueError: no needle.
    """
    if not found:
        raise ValueError("there is no needle to draw: give at least one.")
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        heights = [_HEIGHTS[one.modality] for one in found]
        figure = Figure(figsize=(9, 1.5 * sum(heights) + 0.6), layout="constrained")
        rows = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, one in zip(rows, found, strict=True):
            draw_value(axes, one)
        length = format_length(found[0].length)
        figure.suptitle(f"One needle of each sense in a haystack of {length} tokens, and the model's answer")
    return figure


def draw_value(axes: Axes, one: FoundNeedle) -> None:
    """One value, with a line between digits."""
    axes.set_xticks([])
    axes.set_yticks([])
    if one.modality is Modality.TEXT:
        axes.text(0.5, 0.5, one.answer.decode(), ha="center", va="center", fontsize=30, family="monospace")
        axes.set(xlim=(0, 1), ylim=(0, 1))
    else:
        picture = _picture(one)
        axes.imshow(
            picture,
            aspect="auto" if one.modality is Modality.AUDIO else "equal",
            origin="lower" if one.modality is Modality.AUDIO else "upper",
            cmap="magma" if one.modality is Modality.AUDIO else "gray_r",
            interpolation="nearest",
        )
        for digit in range(1, len(one.answer)):
            axes.axvline(digit * picture.shape[1] / len(one.answer) - 0.5, color=ORANGE, linewidth=1.2)
    written, right = one.written.decode(errors="replace"), one.written == one.answer
    axes.set_title(f"{_TITLES[one.modality]}: {one.source}", loc="left")
    place = f"token {one.place:,} of {one.length:,}"
    axes.set_xlabel(
        f"{place};  asked {one.query.decode()}  answered {written}"
        + ("  (right)" if right else f"  (wrong: {one.answer.decode()})"),
        color=GREEN if right else ORANGE,
    )


def _picture(one: FoundNeedle) -> np.ndarray:
    """The frames side by side (height width)."""
    if one.modality is Modality.AUDIO:
        return one.value[:, _MEL_BANDS].T
    return rearrange(one.value[:, : SIDE * SIDE], "k (h w) -> h (k w)", h=SIDE)
