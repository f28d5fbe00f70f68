"""What a long context costs: reading it, answering from it, exact attention of all pairs, and more experts.

    python -m benchmarks.long_context                      16k to 1M tokens: about 15 minutes on 2 cores
    python -m benchmarks.long_context --quick              16k and 64k: about 2 minutes
    python -m benchmarks.long_context --lengths 10M --dtypes bfloat16
    python -m benchmarks.long_context --run runs/a --run runs/b    two trained runs: their recall as well

The decoder is that of the preset `needle`, with random weights or those of a run: the time is the same.
Prints Markdown tables and the goals, writes benchmarks/results/long_context_*.json.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import long_context_tables
from benchmarks.long_context_attention import measure_all_pairs
from benchmarks.long_context_experts import RECALL_LENGTH, measure_experts, measure_recall
from benchmarks.long_context_goals import judge
from benchmarks.long_context_model import (
    DTYPES,
    chunk_of,
    length_of,
    lengths_of,
    make_decoder,
    make_questions,
    read_text,
    settings_of,
    strict_config,
)
from benchmarks.long_context_peer import measure_peer, why_absent
from benchmarks.long_context_reading import (
    Bench,
    check_reading,
    measure_cache,
    measure_reading,
    measure_strict,
    why_no_memory,
)
from benchmarks.measure import Budget, bytes_per_second, gemm_flops_per_second
from benchmarks.record import FULL, PARTIAL, environment, kind_of, save
from moe.parameters import count_parameters
from moe.prefill import describe_path
from moe.probes.needle.ask import BATCH
from moe.probes.needle.evaluate import check_dtype
from moe.probes.needle.table import format_length
from moe.train.device import choose_device

LENGTHS, QUICK_LENGTHS = "16k,64k,256k,1M", "16k,64k"
STRICT = {"cpu": "16k,64k", "cuda": "64k,256k,1M"}
QUICK_STRICT = {"cpu": "16k", "cuda": "64k"}
STRICT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}  # what matrix units multiply
EXPERTS_LENGTH, PEER_LENGTH = 1 << 16, 1 << 14
# Weights, text and where the record goes select nothing; lengths do when they leave one of the grid out.
NOT_A_SELECTION = ("run", "queries", "recall_length", "folder", "threads", "json", "lengths", "strict")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 0 also when a goal is missed: the table says so."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.dtypes:
        check_dtype(DTYPES[name], options.place)
    bench = make_bench(options)
    record = begin(options, bench)
    check_reading(bench, min(options.lengths))
    read_and_answer(bench, options, record)
    attend_strictly(bench, options, record)
    compare_with_peer(bench, options, record)
    record["experts"] = measure_experts(bench, options.run, min(EXPERTS_LENGTH, max(options.lengths)))
    if len(options.run) == 2:
        asked = options.queries, options.recall_length, options.folder
        record["recall"] = measure_recall(bench, options.run, *asked)
    record["goals"] = judge(record)
    print(long_context_tables.render(record))
    if not options.no_save:
        print(f"\nwritten: {keep(record, options)}")
    return 0


def make_bench(options: argparse.Namespace) -> Bench:
    """The decoder and as much text as the longest part reads."""
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    settings = settings_of(options.first_run)
    tokens = max(*options.lengths, *options.strict, settings.data.sequence_length + 1)
    decoder = make_decoder(settings.model, options.place, options.first_run)
    return Bench(decoder, read_text(options.folder, tokens), options.place, options.seconds, log)


def begin(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """A record with the machine's facts and its two measured rates."""
    config, place = bench.decoder.config, options.place
    dtype = STRICT_DTYPE.get(place.type, "float32")
    letters = ["G" if config.window(i) is None else "L" for i in range(config.num_hidden_layers)]
    return {
        "benchmark": "long_context",
        "mode": options.kind,
        "command": " ".join(["python -m benchmarks.long_context", *options.words]),
        "environment": environment(place),
        "model": asdict(count_parameters(config))
        | {
            "weights": f"run {options.first_run.name}" if options.first_run else "random weights",
            "pattern": "".join(letters),
            "path": describe_path(config),
        },
        "rates": {
            "flops_per_second": gemm_flops_per_second(place, DTYPES[dtype]),
            "dtype": dtype,
            "bytes_per_second": bytes_per_second(place),
        },
        "reading": [],
        "answering": [],
        "strict": [],
        "all_pairs": [],
        "peer": None,
        "experts": None,
        "recall": [],
        "left_out": {},
    }


def read_and_answer(bench: Bench, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Each length: prefills of all dtypes in turns, then answers from a cache of each."""
    questions = make_questions(BATCH)
    for length in options.lengths:
        fits = []
        for name in options.dtypes:
            if reason := why_no_memory(bench, length, DTYPES[name]):
                record["left_out"][f"{format_length(length)}, {name}"] = reason
            else:
                fits.append(name)
        if not fits:
            continue
        bench.log(f"{format_length(length)}: reading")
        timings = measure_reading(bench, length, fits)
        record["reading"].append(
            {"length": length, "timings": {name: asdict(timing) for name, timing in timings.items()}}
        )
        for name in fits:
            bench.log(f"{format_length(length)}, {name}: answering")
            earlier = [cell["attention"] for cell in record["answering"]]
            record["answering"].append(measure_cache(bench, length, name, questions, earlier))
        add_logit_differences([cell for cell in record["answering"] if cell["length"] == length])


def add_logit_differences(cells: list[dict[str, Any]]) -> None:
    """How far the next token's logits are from those of the float32 cache; None where there is none."""
    logits = {cell["dtype"]: torch.tensor(cell.pop("logits")) for cell in cells}
    exact = logits.get("float32")
    for cell in cells:
        difference = None if exact is None else (logits[cell["dtype"]] - exact).abs().max().item()
        cell["logit_difference"] = difference


def attend_strictly(bench: Bench, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Exact attention of all pairs: whole prefills, then the attention alone."""
    config, dtype = strict_config(bench.decoder.config), record["rates"]["dtype"]
    middle = make_decoder(config, bench.device)
    for length in options.strict:
        bench.log(f"{format_length(length)}: every pair of places")
        record["strict"].append(measure_strict(bench, middle, length, dtype))
        budget = Budget(bench.seconds, warmups=1, min_rounds=2, max_rounds=20)
        heads, channels = config.num_attention_heads, config.head_size
        cell = measure_all_pairs(
            length, heads, channels, DTYPES[dtype], chunk_of(bench.device), bench.device, budget
        )
        record["all_pairs"].append(cell | {"flops": 2.0 * length**2 * heads * channels})


def compare_with_peer(bench: Bench, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """The same widths in transformers, where it is installed."""
    length = min(PEER_LENGTH, max(options.lengths))
    if reason := why_absent():
        record["left_out"]["transformers"] = reason
        return
    bench.log(f"{format_length(length)}: transformers")
    record["peer"] = measure_peer(bench, length, make_questions(1)[0])


def keep(record: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write the record, to the file that was named or among the results."""
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return options.json
    name = "long_context" if options.kind == FULL else f"long_context_{options.kind}"
    return save(name, record, options.results)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="16k and 64k, about 2 minutes")
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="a trained run; twice: recall too"
    )
    parser.add_argument("--lengths", type=lengths_of, help=f"of texts, such as 64k,1M,10M; default {LENGTHS}")
    parser.add_argument("--strict", type=lengths_of, help="of exact attention of all pairs")
    parser.add_argument("--dtypes", type=_dtypes, default=tuple(DTYPES), help="of the cache")
    parser.add_argument("--queries", type=int, default=300, help="of each template, about two runs")
    parser.add_argument("--recall-length", type=length_of, default=RECALL_LENGTH)
    parser.add_argument("--folder", type=Path, help="of text; default: the installed packages' source")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=5.0, help="of rounds for one cell")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the record")
    parser.add_argument("--results", type=Path, help="folder of the record, when no file is named")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args(argv)
    if len(options.run) > 2:
        parser.error("--run is given at most twice: two runs are compared")
    options.kind = _kind(parser, options)
    options.words = list(sys.argv[1:] if argv is None else argv)
    options.place = choose_device(options.device)
    options.first_run = options.run[0] if options.run else None
    grid = QUICK_LENGTHS if options.quick else LENGTHS
    strict = (QUICK_STRICT if options.quick else STRICT).get(options.place.type, STRICT["cpu"])
    options.lengths = options.lengths or lengths_of(grid)
    options.strict = options.strict or lengths_of(strict)
    return options


def _kind(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Whole, quick or partial: more lengths than the grid has still make a whole one."""
    chosen = {name: value for name, value in vars(options).items() if name not in NOT_A_SELECTION}
    if options.strict is None and set(lengths_of(LENGTHS)) <= set(options.lengths or lengths_of(LENGTHS)):
        return kind_of(parser, argparse.Namespace(**chosen), quick=options.quick)
    return PARTIAL


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"no dtype {', '.join(unknown)}: choose from {', '.join(DTYPES)}.")
    return names


if __name__ == "__main__":
    sys.exit(main())
