"""The claim: total parameters grow, active parameters and so the cost of a token stay, and the loss falls.

    python -m benchmarks.scaling            quick: under 10 minutes on 2 cores
    python -m benchmarks.scaling --full     5 paired seeds: under an hour on 2 cores

Prints Markdown tables, writes benchmarks/results/scaling_full_*.json (or _quick_; _partial_ with any other
selection) and two figures beside it. A run that was interrupted goes on where it stopped.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import scaling_tables
from benchmarks.record import environment, kind_of, save
from benchmarks.scaling_cost import CostSetting, measure_cost, quick
from benchmarks.scaling_learning import LearningSetting, learn
from moe.train.device import choose_device


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write, draw. Returns 0 also when a rule fails: the table says FAILED."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    record: dict[str, Any] = {"benchmark": "scaling", "mode": options.kind}
    record["environment"] = environment(device)
    if not options.learning_only:
        record["cost"] = measure_cost(cost_setting(options), device, log)
    if not options.cost_only:
        record["learning"] = learn(learning_setting(options), options.jobs, options.store, log)
    print(scaling_tables.render(record))
    path = save(f"scaling_{record['mode']}", record, options.results)
    print(f"\nwritten: {path}")
    for figure in draw(record, path):
        print(f"figure: {figure}")
    return 0


def draw(record: dict[str, Any], path: Path) -> list[Path]:
    """The figures of a record beside its JSON file; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    from benchmarks import scaling_figures

    figures = []
    if record.get("cost"):
        figures.append(scaling_figures.draw_cost(record, path.with_name(f"{path.stem}_cost.png")))
    if record.get("learning"):
        figures.append(scaling_figures.draw_learning(record, path.with_name(f"{path.stem}_learning.png")))
    return figures


def learning_setting(options: argparse.Namespace) -> LearningSetting:
    """What the options ask for. All arms of a mode share everything but their feed-forwards."""
    setting = LearningSetting(folder=options.corpus)
    if not options.full:
        setting = replace(setting, steps=800, seeds=3, seeds_of_extra_arms=0, experts=(4, 16))
    changes = {
        name: getattr(options, name) for name in ("seeds", "steps", "experts") if getattr(options, name)
    }
    return replace(setting, **changes, **json.loads(options.set))


def cost_setting(options: argparse.Namespace) -> CostSetting:
    """What the options ask for."""
    setting = CostSetting() if options.full else quick(CostSetting())
    return replace(setting, **json.loads(options.set_cost))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="the default: 3 seeds, up to 16 experts")
    length.add_argument(
        "--full", action="store_true", help="5 seeds, up to 64 experts, all sizes of the cost table"
    )
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--cost-only", action="store_true")
    half.add_argument("--learning-only", action="store_true")
    parser.add_argument("--seeds", type=int, help="paired seeds")
    parser.add_argument("--steps", type=int, help="training steps of a run")
    parser.add_argument("--experts", type=_numbers, help="sparse arms, such as 4,16,64")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--threads", type=int, help="CPU threads of the cost measurements")
    parser.add_argument("--device", default="auto", help="of the cost measurements")
    parser.add_argument(
        "--corpus", help="train on the text files of this folder instead of the standard library"
    )
    parser.add_argument(
        "--store", type=Path, help="file of finished runs; default: in the user's cache folder"
    )
    parser.add_argument("--results", type=Path, help="folder of the JSON file and the figures")
    parser.add_argument("--set", default="{}", help="JSON of further changes to LearningSetting")
    parser.add_argument("--set-cost", default="{}", help="JSON of changes to CostSetting")
    options = parser.parse_args(argv)
    options.kind = kind_of(parser, options, quick=not options.full)
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
