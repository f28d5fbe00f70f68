"""The command `sparse-moe icl`: trains a model that learns languages in context, measures it, draws.

Each `run_NAME(arguments, show)` is one action. What can be refused is refused before anything is measured,
and files are written when all is.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moe.cli_needle_arguments import DTYPES, length_of
from moe.cli_progress import Watch
from moe.cli_runs import can_draw, open_runs, show_lines

if TYPE_CHECKING:
    from moe.probes.language.exam import Exam
    from moe.probes.language.record import LanguageRecord

Show = Callable[[str], None]
EXAMPLES = "0,1,2,4,8,16,32"


def add_icl(parser: argparse.ArgumentParser) -> None:
    """The actions of `icl` and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, words, add_arguments in (
        ("train", "train the preset language", _add_train),
        ("eval", "exact match by condition, examples and filler; writes a record and a figure", _add_eval),
        ("table", "records of eval as one table, record or figure", _add_table),
    ):
        add_arguments(actions.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}."))


def run_icl(arguments: argparse.Namespace, show: Show) -> int:
    """Run one action."""
    return ACTIONS[arguments.action](arguments, show)


def run_training(arguments: argparse.Namespace, show: Show) -> int:
    """Train, and say how to measure."""
    from moe.train.loop import train
    from moe.train.overrides import change, describe_changes, find_preset
    from moe.train.run_folder import RunFolder

    overrides = list(arguments.overrides)
    if arguments.device:
        overrides.append(f'train.device="{arguments.device}"')
    out = arguments.out
    base = RunFolder(out).read_config() if arguments.resume else find_preset("language")
    config = change(base, None, overrides)
    name = f"the run in {out}" if arguments.resume else "preset language"
    show(f"settings: {name}{describe_changes(base, config)}")
    result = train(config, out, resume=arguments.resume, log=show)
    show(f"checkpoint: {result.checkpoint}")
    show(f"measure it with: sparse-moe icl eval {out}")
    return 0


def run_evaluation(arguments: argparse.Namespace, show: Show) -> int:
    """Every run under every condition, with every number of examples and every filler."""
    from moe.probes.language.evaluate import check_run, evaluate_languages
    from moe.probes.language.exam import CONDITIONS
    from moe.probes.language.record import LanguageRecord
    from moe.probes.language.table import format_filler, format_tally
    from moe.probes.needle.measured import measured_on

    exam, conditions = _exam(arguments), arguments.conditions or list(CONDITIONS)
    runs, target = open_runs(
        arguments,
        "icl_eval.json",
        lambda run: check_run(run, exam, conditions, arguments.examples, arguments.filler),
    )
    most = max(arguments.filler)
    rows = []
    for run in runs:
        text = exam.filler(run, most) if most else None
        for filler in arguments.filler:
            for condition in conditions:
                for examples in arguments.examples:
                    watch = Watch(
                        run.name,
                        condition,
                        f"{examples} examples",
                        f"filler {format_filler(filler)}",
                        show=show,
                    )
                    row = evaluate_languages(
                        run,
                        exam,
                        condition=condition,
                        examples=examples,
                        filler=filler,
                        text=text,
                        progress=watch.answering,
                    )
                    rows.append(row)
                    watch.log(f"{format_tally(row.tally)} % in {row.seconds:.1f} s")
    record = LanguageRecord(tuple(rows), measured_on(runs[0].device))
    record.save(target)
    _print(record, show)
    show(f"written: {target}")
    _draw(record, target.with_suffix(".png"), show)
    return 0


def run_table(arguments: argparse.Namespace, show: Show) -> int:
    """Print records together."""
    from moe.probes.language.record import LanguageRecord, merge
    from moe.probes.needle.measured import check_target

    if arguments.json:
        check_target(arguments.json, ".json")
    if arguments.figure:
        check_target(arguments.figure, ".png")
    record = merge([LanguageRecord.load(path) for path in arguments.records])
    _print(record, show)
    if arguments.figure:
        _draw(record, arguments.figure, show)
    if arguments.json:
        record.save(arguments.json)
        show(f"written: {arguments.json}")
    return 0


def sizes_of(text: str) -> list[int]:
    """ "0,64k" as [0, 65536].

    Raises:
        argparse.ArgumentTypeError: one is no length.
    """
    return [0 if part == "0" else length_of(part) for part in text.split(",")]


def _exam(arguments: argparse.Namespace) -> "Exam":
    import torch

    from moe.probes.language.exam import Exam

    names = ("queries", "languages", "words", "folder", "repeat", "seed")
    given = {name: getattr(arguments, name) for name in names}
    return Exam(**given, dtype=getattr(torch, arguments.dtype))


def _print(record: "LanguageRecord", show: Show) -> None:
    from moe.probes.language.table import language_table

    show_lines(["", *language_table(record)], show)


def _draw(record: "LanguageRecord", path: Path, show: Show) -> None:
    if can_draw(show):
        from moe.report.language import draw_languages

        show(f"figure: {draw_languages(record, path)}")


def _add_train(parser: argparse.ArgumentParser) -> None:
    folder = Path("runs") / "language"
    parser.add_argument(
        "--out", type=Path, default=folder, metavar="FOLDER", help=f"the run folder (default {folder})"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("--device", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="part.key=value", help="such as train.seed=1"
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="folders that `train` wrote")
    parser.add_argument("--checkpoint", metavar="step_00000400", help="default: the newest")
    parser.add_argument("--device", help="default: as in training")
    parser.add_argument(
        "--json", type=Path, metavar="FILE.json", help="default: icl_eval.json in the first run's folder"
    )
    parser.add_argument(
        "--condition",
        dest="conditions",
        action="append",
        metavar="NAME",
        help='such as "dictionary only"; may be given several times (default: all)',
    )
    parser.add_argument(
        "--examples",
        type=sizes_of,
        default=EXAMPLES,
        metavar="0,8",
        help=f"in the context (default {EXAMPLES})",
    )
    parser.add_argument(
        "--filler", type=sizes_of, default="0", metavar="0,64k", help="bytes between the pieces (default 0)"
    )
    parser.add_argument("--queries", type=int, default=200, help="sentences in a cell (default 200)")
    parser.add_argument("--languages", type=int, default=40, help="that they are about (default 40)")
    parser.add_argument("--words", type=int, default=11, help="of the dictionary (default 11)")
    parser.add_argument("--folder", type=Path, help="text of the filler; default: installed packages")
    parser.add_argument("--repeat", action="store_true", help="repeat a text that is too short")
    parser.add_argument("--seed", type=int, default=0, help="another one: other languages, another text")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the cache (default float32)")


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", type=Path, metavar="FILE.json", help="of eval")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="also write them as one record")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw them as one figure")


ACTIONS: dict[str, Callable[[argparse.Namespace, Show], int]] = {
    "train": run_training,
    "eval": run_evaluation,
    "table": run_table,
}
