"""How all figures look."""

from typing import Any

BLUE, ORANGE, GREEN, GREY = "#2b5c8a", "#d1662a", "#3c7a4e", "#8a8a8a"

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
    "legend.fontsize": 9,
}
