"""The arguments of the command `sparse-moe needle`."""

import argparse
from pathlib import Path

from moe.probes.needle.variants import SENSES_VARIANTS, VARIANTS, slug

KIBI, MEBI, MEGA = 2**10, 2**20, 10**6
TEMPLATES = ("key_value", "sentence")
MODALITIES = "text,image,video,audio"
GRID = "16k,64k,256k,1M"
DTYPES = ("float32", "bfloat16", "float16")
EVALUATION = "recall by length and depth, with its bound; writes a record and a heat map"


def add_needle(parser: argparse.ArgumentParser) -> None:
    """The actions of `needle` and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, words, add_arguments in (
        ("train", "train the preset needle, or a variant of it", _add_train),
        ("eval", EVALUATION, _add_eval),
        ("grid", f"eval at {GRID}", _add_grid),
        (
            "several",
            "several needles at once, as in RULER: 4 keys, 4 values of a key, 100 needles",
            _add_several,
        ),
        ("positions", "loss of held-out text by the length of the context before it", _add_positions),
        ("code", '"where is function F defined?" over a whole package; of the variant code', _add_code),
        ("table", "records of eval, grid and code as one table, record or heat map", _add_table),
    ):
        add_arguments(actions.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}."))


def length_of(text: str) -> int:
    """ "64k" as 65536, "1M" as 2^20, "10M" and more as millions, "5000" as it is.

    Raises:
        argparse.ArgumentTypeError: that is no length.
    """
    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    if not digits.isdecimal() or not int(digits) or unit not in ("", "k", "m"):
        raise argparse.ArgumentTypeError(f"{text!r} is no length: give bytes, such as 65536, 64k or 1M.")
    if unit == "m":
        return int(digits) * (MEBI if int(digits) < 10 else MEGA)
    return int(digits) * (KIBI if unit else 1)


def lengths_of(text: str) -> list[int]:
    """ "16k,64k" as [16384, 65536]."""
    return [length_of(part) for part in text.split(",")]


def words_of(text: str) -> list[str]:
    """ "text,image" as ["text", "image"]."""
    return [word.strip() for word in text.split(",")]


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the run folder (default runs/needle, or needle-VARIANT)"
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help=f"the preset with one thing changed: {', '.join(map(slug, VARIANTS))}; "
        f"with --modalities: {', '.join(map(slug, SENSES_VARIANTS))}",
    )
    parser.add_argument(
        "--modalities", type=words_of, metavar=MODALITIES, help="needles in these senses: the preset senses"
    )
    parser.add_argument(
        "--speech",
        type=Path,
        metavar="FOLDER",
        help="with --modalities: WAV files of spoken digits, such as 7_jackson_32.wav, for keypad tones",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("--device", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="part.key=value", help="such as train.seed=1"
    )


def _add_eval(parser: argparse.ArgumentParser, lengths: str | None = None) -> None:
    _add_runs(parser)
    words = "bytes of a haystack: one or several; 1M is 2^20, 10M is 10^7"
    parser.add_argument(
        "--length",
        "--lengths",
        type=lengths_of,
        default=lengths,
        required=lengths is None,
        metavar="64k,1M",
        help=f"{words} (default {lengths})" if lengths else words,
    )
    _add_questions(parser)
    _add_text(parser)
    parser.add_argument(
        "--modalities", type=words_of, metavar=MODALITIES, help="needles in these senses, in one haystack"
    )
    parser.add_argument(
        "--video", type=Path, metavar="FILE", help="with --modalities: its frames are filler (needs PyAV)"
    )
    parser.add_argument("--shuffled", action="store_true", help="also the control with shuffled values")


def _add_grid(parser: argparse.ArgumentParser) -> None:
    _add_eval(parser, GRID)


def _add_several(parser: argparse.ArgumentParser) -> None:
    _add_runs(parser)
    _add_length(parser, "bytes of a haystack")
    _add_questions(parser)
    _add_text(parser)


def _add_positions(parser: argparse.ArgumentParser) -> None:
    _add_runs(parser)
    _add_length(parser, "bytes of the longest context")
    parser.add_argument(
        "--spots", type=int, default=40, help="places of the text whose loss is measured (default 40)"
    )
    _add_text(parser)


def _add_code(parser: argparse.ArgumentParser) -> None:
    _add_runs(parser)
    parser.add_argument("--package", default="numpy", help="its import name, or a folder (default numpy)")
    parser.add_argument("--queries", type=int, default=300, help="functions asked for (default 300)")
    _add_cache(parser)


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", type=Path, metavar="FILE.json", help="of eval, grid or code")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="also write them as one record")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw them as one heat map")


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="folders that `train` wrote")
    parser.add_argument("--checkpoint", metavar="step_00000400", help="default: the newest")
    parser.add_argument("--device", help="default: as in training")
    parser.add_argument(
        "--json", type=Path, metavar="FILE.json", help="default: needle_ACTION.json in the first run's folder"
    )


def _add_length(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument(
        "--length", type=length_of, default="256k", metavar="256k", help=f"{words} (default 256k)"
    )


def _add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, default=300, help="for each template and length (default 300)")
    parser.add_argument("--haystacks", type=int, default=3, help="at least so many (default 3)")
    parser.add_argument("--template", choices=TEMPLATES, help="default: both, in one haystack")
    parser.add_argument(
        "--needles", type=int, help="in each haystack; default one for 256 bytes, up to 2000, 5000 over 1M"
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, help="text around the needles; default: source of the installed packages"
    )
    parser.add_argument(
        "--repeat", action="store_true", help="repeat a text that is too short; results say so"
    )
    _add_cache(parser)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the key-value cache (default float32)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of text, needles and questions (default 0)")
