"""What the commands that measure trained runs share: they open runs, and draw where they can."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.train.runs import Run

Show = Callable[[str], None]


def open_runs(
    arguments: argparse.Namespace, file_name: str, check: "Callable[[Run], None]"
) -> "tuple[list[Run], Path]":
    """All runs, each checked, and the file for what will be measured, also checked.

    file_name: in the folder of the first run, where `arguments.json` names no file.

    Raises:
        ValueError: two runs of one name; as `check`, `open_run` and `check_target`.
    """
    from moe.probes.needle.measured import check_target
    from moe.train.runs import open_run

    runs = [
        open_run(folder, checkpoint=arguments.checkpoint, device=arguments.device)
        for folder in arguments.runs
    ]
    (name, count), *_ = Counter(run.name for run in runs).most_common(1)
    if count > 1:
        raise ValueError(f"{count} runs are called {name!r}, and results tell runs by their names.")
    target = arguments.json or arguments.runs[0] / file_name
    check_target(target, ".json")
    for run in runs:
        check(run)
    return runs, target


def can_draw(show: Show) -> bool:
    """Whether there is matplotlib; says what to do where there is none."""
    if find_spec("matplotlib") is None:
        show("no figure: matplotlib is missing. pip install '.[train]' in a clone of the repository adds it.")
        return False
    return True


def show_lines(lines: Iterable[str], show: Show) -> None:
    """One after another."""
    for line in lines:
        show(line)
