"""The command `sparse-moe needle`: trains a model that finds needles, measures it, draws the figure.

Each `run_NAME(arguments, show)` is one action. What can be refused is refused before anything is measured,
and files are written when all is.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.cli_needle_senses import (
    PRESET,
    check_senses_arguments,
    draw_senses,
    measure_senses,
    print_senses,
    senses_questions,
    training_overrides,
)
from moe.cli_progress import Watch
from moe.cli_runs import can_draw, open_runs, show_lines
from moe.probes.needle.variants import overrides_of, slug

if TYPE_CHECKING:
    from moe.probes.needle.questions import Questions
    from moe.probes.needle.record import NeedleRecord, NeedleRow
    from moe.train.runs import Run

Show = Callable[[str], None]


def run_needle(arguments: argparse.Namespace, show: Show) -> int:
    """Run one action."""
    return ACTIONS[arguments.action](arguments, show)


def run_training(arguments: argparse.Namespace, show: Show) -> int:
    """Train, and say how to measure."""
    from moe.train.loop import train
    from moe.train.overrides import change, describe_changes, find_preset
    from moe.train.run_folder import RunFolder

    check_senses_arguments(arguments)
    variant, preset = arguments.variant, PRESET if arguments.modalities else "needle"
    overrides = [*overrides_of(variant, preset)]
    if arguments.modalities:
        overrides += training_overrides(arguments)
    overrides += arguments.overrides
    if arguments.device:
        overrides.append(f'train.device="{arguments.device}"')
    out = arguments.out = arguments.out or Path("runs") / (f"{preset}-{slug(variant)}" if variant else preset)
    keep_settings = arguments.resume and not variant and not arguments.modalities
    base = RunFolder(out).read_config() if keep_settings else find_preset(preset)
    config = change(base, None, overrides)
    name = f"the run in {out}" if keep_settings else f"preset {preset}"
    show(f"settings: {name}{describe_changes(base, config)}")
    result = train(config, out, resume=arguments.resume, log=show)
    show(f"checkpoint: {result.checkpoint}")
    asked = f" --modalities {','.join(arguments.modalities)}" if arguments.modalities else ""
    show(f"measure it with: sparse-moe needle eval {out} --length 64k{asked}")
    return 0


def run_evaluation(arguments: argparse.Namespace, show: Show) -> int:
    """Recall of every run at every length."""
    from moe.probes.needle.evaluate import check_run, evaluate_needles

    check_senses_arguments(arguments)
    if arguments.modalities:
        return _run_senses(arguments, show)
    questions, lengths = _questions(arguments), arguments.length
    asked = [questions, replace(questions, shuffled=True)] if arguments.shuffled else [questions]
    runs, target = open_runs(arguments, _file(arguments), lambda run: check_run(run, questions, lengths))
    rows: list[NeedleRow] = []
    for run in runs:
        for each in asked:
            for length in lengths:
                watch = Watch(run.name, length, each.variant, show=show)
                rows += evaluate_needles(
                    run, each, length, progress=watch.reading, answered=watch.answering, log=watch.log
                )
    return _report(rows, runs[0], target, show)


def _run_senses(arguments: argparse.Namespace, show: Show) -> int:
    """The same, of needles in every sense."""
    from moe.probes.senses.evaluate import check_senses

    questions, lengths = senses_questions(arguments), arguments.length
    asked = [questions, replace(questions, shuffled=True)] if arguments.shuffled else [questions]
    runs, target = open_runs(arguments, _file(arguments), lambda run: check_senses(run, questions, lengths))
    record, examples = measure_senses(runs, asked, lengths, show)
    record.save(target)
    print_senses(record, show)
    show(f"written: {target}")
    if can_draw(show):
        draw_senses(record, examples, target.with_suffix(".png"), show)
    return 0


def run_code(arguments: argparse.Namespace, show: Show) -> int:
    """Where functions of a package are defined."""
    from moe.probes.needle.evaluate_code import check_code, evaluate_code, find_package

    questions, package = _questions(arguments), find_package(arguments.package)
    runs, target = open_runs(arguments, _file(arguments), lambda run: check_code(run, questions, package))
    rows: list[NeedleRow] = []
    for run in runs:
        watch = Watch(run.name, package.name, show=show)
        rows.append(evaluate_code(run, questions, package, progress=watch.reading, answered=watch.answering))
    return _report(rows, runs[0], target, show)


def run_several(arguments: argparse.Namespace, show: Show) -> int:
    """Several needles at once, in haystacks of one length."""
    from moe.probes.needle.evaluate_several import check_several, evaluate_several, several_table

    questions, length = _questions(arguments), arguments.length
    runs, target = open_runs(arguments, _file(arguments), lambda run: check_several(run, questions, length))
    results = []
    for run in runs:
        watch = Watch(run.name, length, show=show)
        results += evaluate_several(
            run, questions, length, progress=watch.reading, answered=watch.answering, log=watch.log
        )
    _save(results, several_table(results), runs[0], target, show)
    return 0


def run_positions(arguments: argparse.Namespace, show: Show) -> int:
    """Loss after contexts of growing length, up to --length."""
    from moe.probes.needle.positions import check_positions, losses_by_context, positions_table

    questions, longest, spots = _questions(arguments), arguments.length, arguments.spots
    runs, target = open_runs(
        arguments, _file(arguments), lambda run: check_positions(run, questions, longest, spots)
    )
    results = []
    for run in runs:
        watch = Watch(run.name, longest, show=show)
        results.append(losses_by_context(run, questions, longest, spots=spots, progress=watch.spots))
    _save(results, positions_table(results), runs[0], target, show)
    if can_draw(show):
        from moe.report.needle import draw_positions

        losses = {result.run: result.losses for result in results}
        show(f"figure: {draw_positions(losses, target.with_suffix('.png'))}")
    return 0


def run_table(arguments: argparse.Namespace, show: Show) -> int:
    """Print records together."""
    from moe.probes.needle.measured import check_target
    from moe.probes.needle.record import merge
    from moe.probes.senses.record import SensesRecord, load_record

    if arguments.json:
        check_target(arguments.json, ".json")
    if arguments.figure:
        check_target(arguments.figure, ".png")
    records = [load_record(path) for path in arguments.records]
    if len({type(record) for record in records}) > 1:
        raise ValueError("some records are of text alone and some of several senses. Give those of one kind.")
    record = merge(records)
    if isinstance(record, SensesRecord):
        print_senses(record, show)
        if arguments.figure and can_draw(show):
            draw_senses(record, (), arguments.figure, show)
    else:
        _print(record, show)
        if arguments.figure:
            _draw(record, arguments.figure, show)
    if arguments.json:
        record.save(arguments.json)
        show(f"written: {arguments.json}")
    return 0


def _file(arguments: argparse.Namespace) -> str:
    return f"needle_{arguments.action}.json"


def _questions(arguments: argparse.Namespace) -> "Questions":
    """What is asked, as far as the action has arguments for it."""
    import torch

    from moe.probes.needle.questions import Questions

    names = ("queries", "folder", "repeat", "needles", "seed")
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if getattr(arguments, "template", None):
        given["templates"] = (arguments.template,)
    haystacks = getattr(arguments, "haystacks", 1)
    return Questions(**given, haystacks=haystacks, dtype=getattr(torch, arguments.dtype))


def _report(rows: "list[NeedleRow]", run: "Run", target: Path, show: Show) -> int:
    from moe.probes.needle.measured import measured_on
    from moe.probes.needle.record import NeedleRecord

    record = NeedleRecord(tuple(rows), measured_on(run.device))
    record.save(target)
    _print(record, show)
    show(f"written: {target}")
    _draw(record, target.with_suffix(".png"), show)
    return 0


def _save(results: Sequence[Any], table: list[str], run: "Run", target: Path, show: Show) -> None:
    """Print the table of results that are no record, and write them."""
    from moe.probes.needle.measured import measured_on, save_results

    show_lines(["", *table], show)
    save_results(target, results, measured_on(run.device))
    show(f"written: {target}")


def _print(record: "NeedleRecord", show: Show) -> None:
    from moe.probes.needle.table import needle_table, verdicts

    show_lines(["", *needle_table(record), "", *verdicts(record)], show)


def _draw(record: "NeedleRecord", path: Path, show: Show) -> None:
    if can_draw(show):
        from moe.report.needle import draw_needles

        show(f"figure: {draw_needles(record, path)}")


ACTIONS: dict[str, Callable[[argparse.Namespace, Show], int]] = {
    "train": run_training,
    "eval": run_evaluation,
    "grid": run_evaluation,
    "several": run_several,
    "positions": run_positions,
    "code": run_code,
    "table": run_table,
}
