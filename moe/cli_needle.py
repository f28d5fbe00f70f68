"""The command `sparse-moe needle`: trains a model that finds needles, measures it, draws the figure."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.prefill import Progress
    from moe.probes.needle.evaluate import Questions
    from moe.probes.needle.record import NeedleRecord, NeedleRow
    from moe.train.runs import Run

Show = Callable[[str], None]

KIBI, MEBI, MEGA = 2**10, 2**20, 10**6
TEMPLATES = ("key_value", "sentence")
GRID = "16k,64k,256k,1M"
DTYPES = ("float32", "bfloat16", "float16")
BAR_WIDTH = 30


def add_needle(parser: argparse.ArgumentParser) -> None:
    """The actions of `needle` and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train the preset needle, or a variant of it")
    train.add_argument("--out", type=Path, metavar="FOLDER", help="the run folder (default runs/needle)")
    train.add_argument("--variant", help="without one ingredient; --variant list names them")
    train.add_argument("--resume", action="store_true", help="continue the run in the folder")
    train.add_argument("--device", help="auto, cpu, cuda, ...")
    train.add_argument("overrides", nargs="*", default=[], metavar="part.key=value")
    for name, lengths, words in (
        ("eval", None, "recall at one or several lengths"),
        ("grid", GRID, "recall by length and depth, and the heat map"),
    ):
        action = actions.add_parser(name, help=words)
        _add_runs(action)
        action.add_argument(
            "--length",
            "--lengths",
            type=lengths_of,
            default=lengths and lengths_of(lengths),
            required=lengths is None,
            metavar="64k,1M",
            help="bytes of a haystack; 1M is 2^20, 10M is 10^7",
        )
        _add_questions(action)
    for name, words in (
        ("several", "several needles at once, as in RULER"),
        ("positions", "loss of held-out text by the length of the context before it"),
    ):
        action = actions.add_parser(name, help=words)
        _add_runs(action)
        action.add_argument("--length", type=length_of, default=256 * KIBI, metavar="256k")
        action.add_argument("--spots", type=int, default=40, help="places of the text whose loss is measured")
        _add_questions(action)
    code = actions.add_parser("code", help='"where is function F defined?" over an installed package')
    _add_runs(code)
    code.add_argument("--package", default="numpy", help="its import name, or a folder")
    _add_questions(code)
    table = actions.add_parser("table", help="one table and figure of several records")
    table.add_argument("records", nargs="+", type=Path, metavar="FILE.json")
    table.add_argument("--json", type=Path, metavar="FILE", help="also write them as one record")
    table.add_argument("--figure", type=Path, metavar="FILE.png")


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="folders that `train` wrote")
    parser.add_argument("--checkpoint", metavar="step_00000400", help="default: the newest")
    parser.add_argument("--device", help="default: as in training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: in the first run's folder")


def _add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, default=300, help="for each template and length")
    parser.add_argument("--haystacks", type=int, default=3, help="at least so many")
    parser.add_argument("--template", choices=TEMPLATES, help="default: both, in one haystack")
    parser.add_argument("--needles", type=int, help="in each haystack; default one for 256 bytes, up to 2000")
    parser.add_argument("--folder", type=Path, help="text of the haystacks; default: installed packages")
    parser.add_argument("--repeat", action="store_true", help="repeat a text that is too short")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffled", action="store_true", help="also the control with shuffled values")


def run_needle(arguments: argparse.Namespace, show: Show) -> int:
    """Run one action."""
    return ACTIONS[arguments.action](arguments, show)


def run_training(arguments: argparse.Namespace, show: Show) -> int:
    """Train, and ask a few questions at the length of a screenful of files."""
    from moe.probes.needle.variants import overrides_of
    from moe.train.loop import train
    from moe.train.overrides import change, describe_changes, find_preset
    from moe.train.run_folder import RunFolder

    out = arguments.out = arguments.out or Path("runs") / "needle"
    keep_settings = arguments.resume and not arguments.variant
    base = RunFolder(out).read_config() if keep_settings else find_preset("needle")
    device = [f'train.device="{arguments.device}"'] if arguments.device else []
    config = change(base, None, [*overrides_of(arguments.variant), *arguments.overrides, *device])
    show(f"settings: preset needle{describe_changes(base, config)}")
    result = train(config, out, resume=arguments.resume, log=show)
    show(f"checkpoint: {result.checkpoint}")
    show(f"measure it with: sparse-moe needle eval {out} --length 64k")
    return 0


def run_evaluation(arguments: argparse.Namespace, show: Show) -> int:
    """Recall of every run at every length; writes the record and the heat map."""
    rows = [
        row
        for run in _open_runs(arguments)
        for questions in _all_questions(arguments)
        for row in _rows_of(run, questions, arguments.length, show)
    ]
    _report(rows, arguments.json or arguments.runs[0] / f"needle_{arguments.action}.json", show)
    return 0


def run_table(arguments: argparse.Namespace, show: Show) -> int:
    """Print records together."""
    from moe.probes.needle.record import NeedleRecord, merge

    record = merge([NeedleRecord.load(path) for path in arguments.records])
    _print(record, show)
    if arguments.json:
        record.save(arguments.json)
    if arguments.figure:
        _draw(record, arguments.figure, show)
    return 0


def length_of(text: str) -> int:
    """ "64k" as 65536, "1M" as 2^20, "10M" and more as millions, "5000" as it is."""
    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    if not digits.isdecimal() or not int(digits) or unit not in ("", "k", "m"):
        raise argparse.ArgumentTypeError(f"{text!r} is no length: give bytes, such as 65536, 64k or 1M.")
    if unit == "m":
        return int(digits) * (MEBI if int(digits) < 10 else MEGA)
    return int(digits) * (KIBI if unit else 1)


def lengths_of(text: str) -> list[int]:
    """ "16k,64k" as [16384, 65536]."""
    return [length_of(part) for part in text.split(",") if part]


def progress_bar(what: str) -> "Progress":
    """A line on the terminal that fills while a long text is read; nothing where errors go to a file."""

    def draw(done: int, total: int, seconds: float) -> None:
        if not sys.stderr.isatty():
            return
        filled = BAR_WIDTH * done // total
        bar = "#" * filled + "-" * (BAR_WIDTH - filled)
        speed = done / max(seconds, 1e-9)
        left = (total - done) / max(speed, 1e-9)
        end = "\n" if done == total else ""
        text = f"\r{what} [{bar}] {done:,}/{total:,} {speed:,.0f} tokens/s {left:.0f} s left "
        print(text, end=end, file=sys.stderr, flush=True)

    return draw


def _open_runs(arguments: argparse.Namespace) -> "Iterator[Run]":
    from moe.train.runs import open_run

    for folder in arguments.runs:
        yield open_run(folder, checkpoint=arguments.checkpoint, device=arguments.device)


def _all_questions(arguments: argparse.Namespace) -> "list[Questions]":
    """What is asked, and the control where it is wanted."""
    import torch

    from moe.probes.needle.evaluate import Questions

    return [
        Questions(
            queries=arguments.queries,
            haystacks=arguments.haystacks,
            templates=(arguments.template,) if arguments.template else TEMPLATES,
            folder=arguments.folder,
            repeat=arguments.repeat,
            shuffled=shuffled,
            needles=arguments.needles,
            seed=arguments.seed,
            dtype=getattr(torch, arguments.dtype),
        )
        for shuffled in ([False, True] if arguments.shuffled else [False])
    ]


def _rows_of(run: "Run", questions: "Questions", lengths: Sequence[int], show: Show) -> "list[NeedleRow]":
    from moe.probes.needle.evaluate import check_run, evaluate_needles
    from moe.probes.needle.table import format_length

    check_run(run, questions, lengths)
    rows: list[NeedleRow] = []
    for length in lengths:
        name = f"{run.folder.name}, {format_length(length)}"
        bar = progress_bar(name)
        rows += evaluate_needles(
            run, questions, length, progress=bar, log=lambda line, name=name: show(f"{name}, {line}")
        )
    return rows


def _report(rows: "list[NeedleRow]", path: Path, show: Show) -> None:
    from moe.probes.needle.record import NeedleRecord

    record = NeedleRecord(tuple(rows), _environment())
    record.save(path)
    _print(record, show)
    show(f"written: {path}")
    _draw(record, path.with_suffix(".png"), show)


def _print(record: "NeedleRecord", show: Show) -> None:
    from moe.probes.needle.table import needle_table, verdicts

    for line in ("", *needle_table(record), "", *verdicts(record)):
        show(line)


def _draw(record: "NeedleRecord", path: Path, show: Show) -> None:
    try:
        from moe.report.needle import draw_needles
    except ImportError:
        show("no figure: matplotlib is missing. pip install '.[train]' in a clone of the repository adds it.")
        return
    show(f"figure: {draw_needles(record, path)}")


def run_several(arguments: argparse.Namespace, show: Show) -> int:
    """Several needles at once, in haystacks of one length."""
    from moe.doctor import table
    from moe.probes.needle.more import evaluate_several
    from moe.probes.needle.table import format_length, format_percent
    from moe.probes.statistics import lower_bound
    from moe.train.files import write_json

    records: list[dict[str, object]] = []
    for run in _open_runs(arguments):
        for result in evaluate_several(run, _all_questions(arguments)[0], arguments.length, log=show):
            records.append({"run": run.folder.name, "step": run.step, **asdict(result)})
    rows = [
        (
            str(record["run"]),
            str(record["task"]),
            format_length(int(str(record["length"]))),
            f"{record['right']}/{record['asked']}",
            format_percent(int(str(record["right"])) / int(str(record["asked"]))),
            format_percent(lower_bound(int(str(record["right"])), int(str(record["asked"])))),
        )
        for record in records
    ]
    for line in table(("run", "task", "length", "right", "recall %", ">= %"), rows):
        show(line)
    return _write(records, arguments.json or arguments.runs[0] / "needle_several.json", show, write_json)


def run_code(arguments: argparse.Namespace, show: Show) -> int:
    """Where functions of a package are defined."""
    from moe.probes.needle.more import evaluate_code

    package = package_folder(arguments.package)
    questions = _all_questions(arguments)[0]
    rows = [
        evaluate_code(run, questions, package, progress=progress_bar(f"{run.folder.name}, {package.name}"))
        for run in _open_runs(arguments)
    ]
    _report(rows, arguments.json or arguments.runs[0] / "needle_code.json", show)
    return 0


def run_positions(arguments: argparse.Namespace, show: Show) -> int:
    """Loss after contexts of growing length, up to --length."""
    from moe.doctor import table
    from moe.probes.needle.more import losses_by_context
    from moe.probes.needle.table import format_length
    from moe.report.needle import ContextLoss, draw_positions
    from moe.train.files import write_json

    run = next(_open_runs(arguments))
    losses = losses_by_context(
        run, _all_questions(arguments)[0], longest=arguments.length, spots=arguments.spots, log=show
    )
    rows = [
        (
            format_length(int(one["context"])) if one["context"] else "0",
            f"{one['loss']:.4f} +- {one['stderr']:.4f}",
            f"{one['change']:+.4f} +- {one['change_stderr']:.4f}" if "change" in one else "",
        )
        for one in losses
    ]
    for line in table(("bytes before", "nats a byte", "change, paired"), rows):
        show(line)
    path = arguments.json or run.folder / "needle_positions.json"
    _write(losses, path, show, write_json)
    drawn: list[ContextLoss] = [
        {"context": max(int(one["context"]), 1), "loss": one["loss"], "stderr": one["stderr"]}
        for one in losses
    ]
    show(f"figure: {draw_positions(drawn, path.with_suffix('.png'))}")
    return 0


def package_folder(name: str) -> Path:
    """The folder of an installed package, or the folder given.

    Raises:
        ValueError: no such package or folder.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None or Path(found.origin).name != "__init__.py":
        raise ValueError(f"--package {name!r} is no installed package with a folder, and no folder.")
    return Path(found.origin).parent


def _write(data: object, path: Path, show: Show, write_json: Callable[[Path, object], None]) -> int:
    write_json(path, {"environment": _environment(), "results": data})
    show(f"written: {path}")
    return 0


def _environment() -> dict[str, object]:
    """Where it was measured, for a record."""
    from moe.doctor import environment

    return {**environment(), "date": datetime.now(UTC).date().isoformat()}


ACTIONS: dict[str, Callable[[argparse.Namespace, Show], int]] = {
    "train": run_training,
    "eval": run_evaluation,
    "grid": run_evaluation,
    "several": run_several,
    "positions": run_positions,
    "code": run_code,
    "table": run_table,
}
