"""What a command says while something long is done: a line on the terminal that fills."""

import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.prefill import Progress

NARROWEST, WIDEST = 5, 30  # a bar, in characters


class Watch:
    """What is said while one run is asked: bars on the terminal, and lines, which name run and subject.

    subjects: lengths, or words; empty ones are left out.
    """

    def __init__(self, run: str, *subjects: int | str, show: Callable[[str], None]) -> None:
        from moe.probes.needle.table import format_length

        words = (format_length(one) if isinstance(one, int) else one for one in subjects)
        self.name, self.show = ", ".join(filter(None, (run, *words))), show
        self.reading = progress_bar(f"{self.name}: read", "bytes")
        self.answering = progress_bar(f"{self.name}: answered", "questions")
        self.spots = progress_bar(f"{self.name}: measured", "spots")

    def log(self, line: str) -> None:
        """Print a line that says what it is about."""
        self.show(f"{self.name}, {line}")


def progress_bar(what: str, unit: str) -> "Progress":
    """Draws `what [###---] done/total unit, speed, time left`; nothing where errors go to a file.

    The bar is as wide as the line leaves room for, and the line cut to the width of the terminal, so that it
    always draws over itself.
    """

    def draw(done: int, total: int, seconds: float) -> None:
        if not sys.stderr.isatty():
            return
        speed = done / max(seconds, 1e-9)
        left = (total - done) / max(speed, 1e-9)
        figures = f"{done:,}/{total:,} {unit}, {_digits(speed)}/s, {left:.0f} s left"
        room = shutil.get_terminal_size().columns - 1
        width = min(WIDEST, max(room - len(what) - len(figures) - len(" [] "), NARROWEST))
        filled = width * done // total
        line = f"{what} [{'#' * filled}{'-' * (width - filled)}] {figures}"
        end = "\n" if done == total else ""
        print(f"\r{line[:room]:<{room}}", end=end, file=sys.stderr, flush=True)

    return draw


def _digits(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
