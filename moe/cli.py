"""The command `sparse-moe`: parses, calls the library, prints.

One function a command: `add_NAME(parser)` declares its arguments, `run_NAME(arguments)` does the work.
A new command is one more such pair in COMMANDS.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe import cli_experts, cli_icl, cli_needle
from moe.cli_icl import add_icl
from moe.cli_needle_arguments import add_needle
from moe.version import __version__

if TYPE_CHECKING:
    from moe.hf.convert import Source
    from moe.train.loop import TrainResult

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
LOGITS_AGREE = 1e-4  # float32, of logits of any size that a model gives
INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: its help, its arguments, its work. `run` returns the exit code."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0, 1 for a failed check, 2 for a user's error, 130 for Ctrl-C."""
    parsed = parse(arguments)
    try:
        return COMMANDS[parsed.command].run(parsed)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; all files are complete.", file=sys.stderr)
        if (hint := how_to_go_on(parsed)) is not None:
            print(f"continue with: {hint}", file=sys.stderr)
        return INTERRUPTED


def how_to_go_on(parsed: argparse.Namespace) -> str | None:
    """The command that continues a training that was interrupted; None where there is none."""
    from moe.train.run_folder import RunFolder

    out = getattr(parsed, "out", None)
    if out is None or not RunFolder(out).config_file.exists():
        return None
    command = "train" if parsed.command == "train" else f"{parsed.command} train"
    return f"sparse-moe {command} --out {out} --resume"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides may stand before, between and after the options."""
    parser = make_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="sparse-moe", description="Sparse Mixture-of-Experts transformers on your own machine."
    )
    parser.add_argument("--version", action="version", version=f"sparse-moe {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.help, description=command.help))
    return parser


def add_train(parser: argparse.ArgumentParser) -> None:
    """Arguments of `train`."""
    parser.add_argument("--preset", help="tiny, demo (default) or gpu-small")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings that change the preset")
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FOLDER", help="the run folder (default runs/PRESET)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("--device", help="auto, cpu, cuda, ...; the same as train.device=")
    parser.add_argument(
        "--no-report", action="store_true", help="stop after the last step: no sample, no figure"
    )
    parser.add_argument("overrides", nargs="*", metavar="part.key=value", help="such as optim.lr=1e-3")


def run_train(arguments: argparse.Namespace) -> int:
    """Train, then measure, sample and draw."""
    from moe.train.loop import train
    from moe.train.overrides import change, describe_changes, find_preset
    from moe.train.run_folder import RunFolder

    preset = arguments.preset or "demo"
    arguments.out = arguments.out or Path("runs") / preset
    keep_settings = arguments.resume and not arguments.preset
    base = RunFolder(arguments.out).read_config() if keep_settings else find_preset(preset)
    device = [f'train.device="{arguments.device}"'] if arguments.device else []
    config = change(base, arguments.config, [*arguments.overrides, *device])
    name = f"the run in {arguments.out}" if keep_settings else f"preset {preset}"
    show(f"settings: {name}{describe_changes(base, config)}")
    result = train(config, arguments.out, resume=arguments.resume, log=show)
    show(f"checkpoint: {result.checkpoint}")
    if not arguments.no_report:
        show_results(result, arguments.device)
    return 0


def show_results(result: "TrainResult", device: str | None) -> None:
    """What a finished run is worth: a sample, bits per byte beside compressors, a figure."""
    from moe.train.files import write_bytes
    from moe.train.runs import evaluate_run, held_out_excerpt, open_run, sample_text

    folder = result.folder
    run = open_run(folder, device=device)
    prompt = held_out_excerpt(run, corpus=result.corpus)
    text = sample_text(run, prompt)
    write_bytes(folder / "samples.txt", text.encode("utf-8"))
    show(f"\nsample (also in {folder / 'samples.txt'}); held-out text as the prompt:\n{indent(prompt)}")
    show(f"the model goes on:\n{indent(text.removeprefix(prompt))}\n")
    show_evaluation(evaluate_run(run, corpus=result.corpus))
    try:
        from moe.report.figures import draw_run
    except ImportError:
        show("no figure: matplotlib is missing. pip install '.[train]' in a clone of the repository adds it.")
        return
    show(f"figure: {draw_run(folder)}")


def show_evaluation(record: dict[str, float]) -> None:
    """The table of bits per byte."""
    from moe.doctor import table

    show(
        f"validation: loss {record['loss']:.4f} nats a token after {record['step']} steps, "
        f"on {record['bytes']} bytes of held-out files"
    )
    rows = [
        ("this model", f"{record['bits_per_byte']:.3f}"),
        ("gzip -9", f"{record['gzip']:.3f}"),
        ("xz -9e", f"{record['xz']:.3f}"),
    ]
    for line in table(("on the same bytes", "bits per byte"), rows):
        show(line)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that opens a run."""
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="a folder that `train` wrote")
    parser.add_argument("--checkpoint", metavar="step_00000400", help="default: the newest")
    parser.add_argument("--device", help="default: as in training")


def add_sample(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sample`."""
    add_run_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue; empty: a document from its beginning")
    parser.add_argument("--tokens", type=int, default=300, help="at most so many new tokens")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)


def run_sample(arguments: argparse.Namespace) -> int:
    """Print text from a checkpoint."""
    from moe.train.runs import open_run, sample_text

    run = open_run(arguments.run, checkpoint=arguments.checkpoint, device=arguments.device)
    show(
        sample_text(
            run,
            arguments.prompt,
            tokens=arguments.tokens,
            seed=arguments.seed,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
        )
    )
    return 0


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Arguments of `eval`."""
    add_run_arguments(parser)
    parser.add_argument(
        "--tokens", type=int, help="of the validation split; default: train.final_eval_tokens"
    )
    parser.add_argument("--lm-eval", metavar="TASKS", help="instead: tasks of lm-eval, such as arc_easy,piqa")
    parser.add_argument("--lm-eval-path", type=Path, metavar="FOLDER", help="a folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="documents of each task of lm-eval; default: all")


def run_eval(arguments: argparse.Namespace) -> int:
    """Measure a checkpoint on held-out files, or on tasks of lm-eval; writes eval.json, or lm_eval.json."""
    from moe.train.runs import evaluate_run, open_run

    if arguments.lm_eval:
        return run_lm_eval(arguments)
    run = open_run(arguments.run, checkpoint=arguments.checkpoint, device=arguments.device)
    show_evaluation(evaluate_run(run, max_tokens=arguments.tokens, log=show))
    show(f"written: {arguments.run / 'eval.json'}")
    return 0


def run_lm_eval(arguments: argparse.Namespace) -> int:
    """Measure a run or a model folder on tasks of lm-eval; writes lm_eval.json."""
    from moe.doctor import table
    from moe.train.files import write_json

    try:
        from moe.probes.lm_eval import SparseMoELM, evaluate_tasks
    except ImportError as error:
        way_out = "pip install '.[eval]' in a clone of the repository"
        raise ImportError(f"--lm-eval needs the lm-eval package ({error}): {way_out}.") from error
    model = SparseMoELM(arguments.run, checkpoint=arguments.checkpoint, device=arguments.device)
    tasks = [task for task in arguments.lm_eval.split(",") if task]
    results = evaluate_tasks(model, tasks, path=arguments.lm_eval_path, limit=arguments.limit)
    rows = [(task, name, f"{value:.4f}") for task, found in results.items() for name, value in found.items()]
    for line in table(("task", "metric", "value"), rows):
        show(line)
    write_json(arguments.run / "lm_eval.json", results)
    show(f"written: {arguments.run / 'lm_eval.json'}")
    return 0


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of `convert`."""
    parser.add_argument("source", type=Path, help="a run, a model folder, or a Hugging Face folder")
    parser.add_argument("target", type=Path, help="a new folder, or a file for --to gguf")
    parser.add_argument(
        "--to",
        choices=("hub", "packed", "model", "run", "gguf"),
        help="default: run for a Hugging Face folder, else hub; hub, packed: Hugging Face's two layouts",
    )
    parser.add_argument("--checkpoint", metavar="step_00000400", help="of a run; default: the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers' own")
    parser.add_argument("--ids", help="token ids for --verify, such as 5,17,3; default: random ones")
    parser.add_argument("overrides", nargs="*", metavar="part.key=value", help="of the training, --to run")


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert a model; with --verify, compare what transformers computes."""
    import torch

    from moe.hf.convert import convert, default_target, open_source

    source = open_source(arguments.source, checkpoint=arguments.checkpoint)
    kind = arguments.to or default_target(source)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    done = convert(source, arguments.target, kind, dtype=dtype, overrides=arguments.overrides)
    show(f"{arguments.source} ({source.kind}) -> {done.target} ({done.kind}): {done.architecture}")
    show(f"{done.tensors} tensors, all mapped")
    for note in done.notes:
        show(note)
    if kind == "run":
        show(f"train it with: sparse-moe train --out {done.target} --resume")
    return show_comparison(arguments, source, kind) if arguments.verify else 0


def show_comparison(arguments: argparse.Namespace, source: "Source", target: str) -> int:
    """Compare the two ends of a conversion by their logits; 1 when they differ."""
    import torch

    from moe.hf.convert import compare, open_source, random_ids

    if target in ("hub", "packed"):
        decoder, folder = source.decoder, arguments.target
    elif source.kind == "hugging face" and target in ("model", "run"):
        decoder, folder = open_source(arguments.target).decoder, arguments.source
    else:
        raise ValueError(f"--verify: transformers reads neither end of {source.kind} -> {target}.")
    given = [[int(word) for word in arguments.ids.split(",")]] if arguments.ids else None
    ids = torch.tensor(given) if given else random_ids(decoder)
    largest = compare(decoder, folder, ids, dtype=getattr(torch, arguments.dtype or "float32"))
    verdict = "within" if largest <= LOGITS_AGREE else "MORE THAN"
    show(
        f"verified against transformers on {ids.numel()} ids: "
        f"largest difference of logits {largest:.1e}, {verdict} {LOGITS_AGREE:.0e}"
    )
    return 0 if largest <= LOGITS_AGREE else 1


def run_needle(arguments: argparse.Namespace) -> int:
    """Run one action of `needle`."""
    return cli_needle.run_needle(arguments, show)


def run_icl(arguments: argparse.Namespace) -> int:
    """Run one action of `icl`."""
    return cli_icl.run_icl(arguments, show)


def run_experts(arguments: argparse.Namespace) -> int:
    """Run `experts`."""
    return cli_experts.run_experts(arguments, show)


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench`."""
    parser.add_argument("name", nargs="?", help="which benchmark; without a name: list them")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="passed on to the benchmark")


def run_bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark of the checkout that this package is in."""
    from moe.config import did_you_mean

    root = Path(__file__).resolve().parent.parent
    found = sorted(path.stem for path in (root / "benchmarks").glob("*.py") if is_benchmark(path))
    if not found:
        raise ValueError(
            "the benchmarks are not part of the installed package. Get the source of sparse-moe "
            "(the repository or the sdist), and run `sparse-moe bench` or `python -m benchmarks.NAME` in it."
        )
    if arguments.name is None:
        show("benchmarks: " + ", ".join(found))
        return 0
    if arguments.name not in found:
        raise ValueError(f"there is no benchmark {arguments.name!r}.{did_you_mean(arguments.name, found)}")
    command = [sys.executable, "-m", f"benchmarks.{arguments.name}", *arguments.options]
    return subprocess.run(command, cwd=root, check=False).returncode


def is_benchmark(file: Path) -> bool:
    """Whether a file of benchmarks/ is meant to be run."""
    return not file.stem.startswith("_") and "__main__" in file.read_text(encoding="utf-8")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Arguments of `doctor`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print what is installed and which backend each operation would use."""
    from moe.doctor import report
    from moe.train.device import choose_device

    for line in report(choose_device(arguments.device)):
        show(line)
    return 0


def show(line: str) -> None:
    """Print at once, also into a pipe, whatever the terminal can encode."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, errors="replace").decode(encoding), flush=True)


def indent(text: str) -> str:
    """The text with a bar before each line."""
    return "\n".join(f"  | {line}" for line in text.splitlines())


COMMANDS = {
    "train": Command("train a model and leave a run folder", add_train, run_train),
    "sample": Command("text from a checkpoint", add_sample, run_sample),
    "eval": Command("validation loss and bits per byte, or tasks of lm-eval", add_eval, run_eval),
    "convert": Command("from and to Hugging Face folders, GGUF", add_convert, run_convert),
    "needle": Command("needles in long contexts: train, measure, draw", add_needle, run_needle),
    "icl": Command("languages learnt in context: train, measure, draw", add_icl, run_icl),
    "experts": Command("which experts each domain of text goes to", cli_experts.add_experts, run_experts),
    "bench": Command("run a benchmark of the source tree", add_bench, run_bench),
    "doctor": Command("what is installed and which backend is used", add_doctor, run_doctor),
}
