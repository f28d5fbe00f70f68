"""The part of `sparse-moe needle` that has several senses: --modalities text,image,video,audio."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe.cli_progress import Watch
from moe.cli_runs import show_lines

if TYPE_CHECKING:
    from moe.probes.senses.evaluate import FoundNeedle
    from moe.probes.senses.questions import SensesQuestions
    from moe.probes.senses.record import SensesRecord, SensesRow
    from moe.train.runs import Run

Show = Callable[[str], None]
PRESET = "senses"


def check_senses_arguments(arguments: argparse.Namespace) -> None:
    """Refuse arguments that do not go together.

    Raises:
        ValueError: --speech or --video without --modalities, or --template with it.
    """
    for name in ("speech", "video"):
        if getattr(arguments, name, None) is not None and not arguments.modalities:
            raise ValueError(
                f"--{name} is for needles of several senses: add --modalities text,image,video,audio."
            )
    if arguments.modalities and getattr(arguments, "template", None):
        raise ValueError("--template is for needles of text alone. Leave it out, or leave out --modalities.")


def training_overrides(arguments: argparse.Namespace) -> list[str]:
    """Overrides of the preset `senses` that the arguments of `train` stand for."""
    names = ", ".join(f'"{name}"' for name in arguments.modalities)
    overrides = [f"senses.modalities=[{names}]"]
    if arguments.speech is not None:
        overrides.append(f'senses.speech_folder="{arguments.speech.expanduser().resolve()}"')
    return overrides


def senses_questions(arguments: argparse.Namespace) -> "SensesQuestions":
    """What is asked, of the arguments of `eval` and `grid`."""
    import torch

    from moe.probes.senses.questions import SensesQuestions

    names = ("queries", "haystacks", "folder", "repeat", "needles", "seed", "video")
    return SensesQuestions(
        **{name: getattr(arguments, name) for name in names},
        templates=tuple(arguments.modalities),
        dtype=getattr(torch, arguments.dtype),
    )


def measure_senses(
    runs: "Sequence[Run]", asked: "Sequence[SensesQuestions]", lengths: Sequence[int], show: Show
) -> "tuple[SensesRecord, list[FoundNeedle]]":
    """A record of every run at every length, and examples of the last length of the first run."""
    from moe.probes.needle.measured import measured_on
    from moe.probes.senses.evaluate import evaluate_senses
    from moe.probes.senses.record import SensesRecord

    rows: list[SensesRow] = []
    examples: list[FoundNeedle] = []
    for run in runs:
        for questions in asked:
            for length in lengths:
                watch = Watch(run.name, length, questions.variant, show=show)
                result = evaluate_senses(
                    run,
                    questions,
                    length,
                    progress=watch.reading,
                    answered=watch.answering,
                    log=watch.log,
                )
                rows += result.rows
                if run is runs[0] and not questions.shuffled:
                    examples = result.examples
    return SensesRecord(tuple(rows), measured_on(runs[0].device)), examples


def print_senses(record: "SensesRecord", show: Show) -> None:
    """The table and the verdicts."""
    from moe.probes.senses.table import senses_table, senses_verdicts

    show_lines(["", *senses_table(record), "", *senses_verdicts(record)], show)


def draw_senses(record: "SensesRecord", examples: "Sequence[FoundNeedle]", path: Path, show: Show) -> None:
    """The heat maps, and a picture of needles that were found."""
    from moe.report.needle import draw_needles
    from moe.report.senses import draw_found

    show(f"figure: {draw_needles(record, path, unit='tokens')}")
    if examples:
        show(f"figure: {draw_found(examples, path.with_name(f'{path.stem}_found.png'))}")
