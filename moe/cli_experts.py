"""The command `sparse-moe experts`: which experts each domain, or each sense, goes to, beside chance."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe.cli_runs import can_draw, show_lines

if TYPE_CHECKING:
    from moe.decoder import Decoder
    from moe.probes.specialisation.domains import Source
    from moe.probes.specialisation.measure import LabelledBatch
    from moe.probes.specialisation.record import SpecialisationRecord
    from moe.train.runs import Run

Show = Callable[[str], None]
TOKENS = 2**15
PERMUTATIONS = 999
CONTROLS = 3
FILE = "experts.json"


def add_experts(parser: argparse.ArgumentParser) -> None:
    """Arguments of `experts`."""
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="a folder that `train` wrote")
    parser.add_argument("--checkpoint", metavar="step_00000400", help="default: the newest")
    parser.add_argument("--device", help="default: as in training")
    parser.add_argument(
        "--domain",
        action="append",
        type=domain_of,
        metavar="NAME=FOLDER",
        help="a folder of text files, at least two of these; default: Python source of installed packages, "
        "C++ headers of torch, and what packages say of themselves in prose",
    )
    parser.add_argument(
        "--modalities",
        action="store_true",
        help="instead of domains: the senses in a haystack of held-out needles; of the preset senses",
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"of each domain, or of the haystack (default {TOKENS})"
    )
    parser.add_argument(
        "--permutations",
        type=int,
        default=PERMUTATIONS,
        help=f"shuffles of the labels (default {PERMUTATIONS})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of text and of the shuffles")
    parser.add_argument(
        "--controls",
        type=int,
        default=CONTROLS,
        help=f"the same model before any training, so many times (default {CONTROLS})",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE.json", help=f"default: {FILE} in the run folder; the figure beside"
    )


def domain_of(text: str) -> tuple[str, Path]:
    """ "code=my/folder" as ("code", Path("my/folder")).

    Raises:
        argparse.ArgumentTypeError: it is not of that form.
    """
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is no domain: give NAME=FOLDER, such as prose=my/texts.")
    return name, Path(folder)


def run_experts(arguments: argparse.Namespace, show: Show) -> int:
    """Read text of every domain, or of every sense; print, write and draw where its tokens went."""
    from moe.probes.needle.measured import check_target
    from moe.train.runs import open_run

    run = open_run(arguments.run, checkpoint=arguments.checkpoint, device=arguments.device)
    if not run.model.moe_layers:
        raise ValueError(
            f"{arguments.run} has no MoE layer, and so no experts. Train with model.num_experts."
        )
    for name in ("tokens", "permutations"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least 1.")
    if arguments.controls < 0:
        raise ValueError(f"controls={arguments.controls} must be at least 0, for none.")
    target = arguments.json or arguments.run / FILE
    check_target(target, ".json")
    read = _read_haystack if arguments.modalities else _read_domains
    record = _measure(run, read(run, arguments, show), arguments)
    record.save(target)
    _print(record, show)
    show(f"written: {target}")
    if can_draw(show):
        from moe.report.specialisation import draw_specialisation

        show(f"figure: {draw_specialisation(record, target.with_suffix('.png'))}")
    return 0


class _Labelled(NamedTuple):
    """Labels, the batches that a model reads, and the facts of what the labels stand on."""

    labels: "Sequence[str]"
    batches: "Callable[[Decoder], Iterable[LabelledBatch]]"
    facts: dict[str, Any]


def _read_domains(run: "Run", arguments: argparse.Namespace, show: Show) -> _Labelled:
    from moe.probes.needle.questions import trained_digests
    from moe.probes.specialisation.domains import domain_batches, read_domain, read_domains

    read = partial(
        read_domain,
        tokenizer=run.tokenizer,
        tokens=arguments.tokens,
        sequence_length=run.config.data.sequence_length,
        seed=arguments.seed,
        exclude_digests=trained_digests(run),
    )
    texts = read_domains(_sources(arguments), read)
    facts: dict[str, Any] = {}
    for name, text in texts.items():
        show(f"{name}: {text.tokens:,} tokens in {len(text.sequences)} sequences of {text.files} files")
        count = {"files": text.files, "sequences": len(text.sequences)}
        facts[name] = {"folder": text.folder, **count, "digest": text.digest}
    return _Labelled(list(texts), lambda model: domain_batches(list(texts.values()), run.device), facts)


def _sources(arguments: argparse.Namespace) -> "Mapping[str, Source]":
    from moe.probes.specialisation.domains import Source, default_sources

    if not arguments.domain:
        return default_sources()
    sources: dict[str, Source] = {}
    for name, folder in arguments.domain:
        if name in sources:
            raise ValueError(f"--domain {name}= is given twice. Give each domain a name of its own.")
        sources[name] = Source(folder)
    return sources


def _read_haystack(run: "Run", arguments: argparse.Namespace, show: Show) -> _Labelled:
    """A haystack of every sense that the run knows, of held-out images and sounds."""
    from moe.probes.senses.questions import SensesQuestions, make_senses_haystacks
    from moe.probes.specialisation.modalities import MODALITIES, modality_batches

    if arguments.domain:
        raise ValueError("--modalities and --domain are two questions. Ask them one after the other.")
    questions = SensesQuestions(queries=1, haystacks=1, seed=arguments.seed)
    haystack, text = next(make_senses_haystacks(run, questions, arguments.tokens))
    show(f"a haystack of {len(haystack.prompt):,} tokens with {len(haystack.needles):,} needles")
    facts = {"folder": text.root.name, "files": text.files, "digest": text.digest}
    length = run.config.data.sequence_length
    return _Labelled(
        MODALITIES,
        lambda model: modality_batches(model, [haystack.prompt], length=length),
        {"haystack": {"tokens": len(haystack.prompt), "needles": len(haystack.needles), "text": facts}},
    )


def _measure(run: "Run", labelled: _Labelled, arguments: argparse.Namespace) -> "SpecialisationRecord":
    from moe.probes.needle.measured import measured_on
    from moe.probes.specialisation.measure import Specialisation, specialisation_of, untrained
    from moe.probes.specialisation.record import SpecialisationRecord

    def measure(model: "Decoder", permutations: int) -> Specialisation:
        with run.autocast():
            return specialisation_of(
                model,
                labelled.batches(model),
                labels=labelled.labels,
                permutations=permutations,
                seed=arguments.seed,
            )

    found = measure(run.model, arguments.permutations)
    seeds = range(arguments.seed * arguments.controls, (arguments.seed + 1) * arguments.controls)
    controls = tuple(
        measure(untrained(run.model, seed), 1) for seed in seeds
    )  # only their information counts
    return SpecialisationRecord(
        run.name,
        run.step,
        run.config.data.sequence_length,
        arguments.seed,
        labelled.facts,
        found,
        controls,
        measured_on(run.device),
    )


def _print(record: "SpecialisationRecord", show: Show) -> None:
    from moe.probes.specialisation.record import information_table, shares_table, verdict

    found = record.found
    table, shares = information_table(found, record.untrained), shares_table(found)
    show_lines(["", *table, "", *shares, "", verdict(found, record.untrained)], show)
