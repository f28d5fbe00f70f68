"""One sparse layer against whatever else computes it, and against the dense layer of equal active FLOPs.

    python -m benchmarks.layer             all sizes: about 20 minutes on 2 cores
    python -m benchmarks.layer --quick     the sizes of the goals: about 2 minutes

Prints Markdown tables and whether each speed goal is met, and writes benchmarks/results/layer_*.json; with
--quick layer_quick_*.json, with any other selection layer_partial_*.json.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import layer_tables
from benchmarks.accuracy import Expected, WrongResultError, check, expected_of
from benchmarks.candidates import OURS, Candidate, make_candidates, make_layer, why_not
from benchmarks.goals import judge
from benchmarks.measure import (
    Budget,
    Prepare,
    Timing,
    bytes_per_second,
    gemm_flops_per_second,
    import_seconds,
    peak_bytes,
    time_in_turns,
)
from benchmarks.record import FULL, environment, kind_of, save
from benchmarks.shapes import SHAPES, Shape, experts_flops
from moe.losses import max_violation
from moe.train.device import choose_device

TOKENS = (1, 16, 256, 2048, 16384)
EXPERTS = (8, 16, 64, 256)
QUICK_TOKENS = (1, 2048)
QUICK_EXPERTS = (16, 256)
INPUTS = 64  # different inputs in turn while they are few tokens, so that their experts are not all in cache
MEMORY_TOKENS = 2048  # the size whose peak memory is measured


@dataclass(frozen=True, slots=True)
class Cell:
    """One size: what is timed side by side."""

    tokens: int
    experts: int
    backward: bool
    zipf: bool


@dataclass(slots=True)
class Result:
    """What a cell gave: timings by candidate, why a candidate has none, and how uneven the load was."""

    cell: Cell
    flops: float
    max_violation: float
    timings: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)


def measure_sizes(shape: Shape, options: argparse.Namespace, log: Callable[[str], None]) -> Iterable[Result]:
    """All cells, one set of weights for each number of experts and each kind of load."""
    device, dtype = choose_device(options.device), getattr(torch, options.dtype)
    for e in options.experts:
        for zipf in options.loads:
            sized = shape.with_experts(e)
            layer = make_layer(sized, zipf=zipf).to(device, dtype)
            candidates = make_candidates(layer, sized)
            for tokens in options.tokens:
                log(f"t={tokens} e={e} {'Zipf' if zipf else 'balanced'}")
                yield from _measure_tokens(candidates, sized, tokens, zipf, options)


def _measure_tokens(
    candidates: list[Candidate], shape: Shape, tokens: int, zipf: bool, options: argparse.Namespace
) -> Iterable[Result]:
    """The forward and the forward + backward cell of one size, checked before they are timed."""
    layer = next(c.layer for c in candidates if c.layer is not None)
    weight = layer.router.weight
    generator = torch.Generator().manual_seed(tokens)
    count = INPUTS if tokens <= 16 else 1
    inputs = [torch.randn(tokens, shape.d, generator=generator).to(weight) for _ in range(count)]
    expected = expected_of(layer, inputs)
    with torch.no_grad():
        load = torch.stack([layer.router(x).tokens_per_expert() for x in inputs]).sum(0)
    for backward in (False, True):
        result = Result(
            Cell(tokens, shape.e, backward, zipf),
            experts_flops(tokens * shape.k, shape.d, shape.h, backward=backward),
            max_violation(load).item(),
        )
        runnable = _allowed(candidates, shape, result, weight.element_size())
        runnable = [c for c in runnable if _is_right(c, expected, result)]
        works = {
            candidate.name: work_of(candidate, inputs, backward=backward, place=i / len(runnable))
            for i, candidate in enumerate(runnable)
        }
        result.timings = time_in_turns(works, weight.device, _budget(tokens, options))
        if backward and tokens == MEMORY_TOKENS:
            result.peak_bytes = {
                name: peak_bytes(works[name](0), weight.device)
                for name, timing in result.timings.items()
                if timing.runs > 1
            }
        yield result


def _is_right(candidate: Candidate, expected: Expected, result: Result) -> bool:
    """Whether a candidate may be timed. A peer's wrong result costs it its row; ours stops the benchmark."""
    try:
        check(candidate, expected, backward=result.cell.backward)
    except WrongResultError as error:
        if candidate.name == OURS:
            raise
        result.skipped[candidate.name] = str(error)
        return False
    return True


def _allowed(candidates: list[Candidate], shape: Shape, result: Result, item_bytes: int) -> list[Candidate]:
    cell = result.cell
    for candidate in candidates:
        reason = why_not(candidate.name, shape, cell.tokens, backward=cell.backward, item_bytes=item_bytes)
        if reason:
            result.skipped[candidate.name] = reason
    return [candidate for candidate in candidates if candidate.name not in result.skipped]


def work_of(candidate: Candidate, inputs: list[Tensor], *, backward: bool, place: float) -> Prepare:
    """One run of a candidate: forward without gradients, or forward, backward to x and all parameters.

    `place` in [0, 1) shifts which of the inputs is used when, so that no candidate finds the weights in cache
    that another one has just read for the same tokens.
    """
    offset = int(place * len(inputs))
    upstream = torch.randn_like(inputs[0])

    def prepare(number: int) -> Callable[[], object]:
        x = inputs[(number + offset) % len(inputs)].detach().requires_grad_(backward)
        for parameter in candidate.parameters:
            parameter.grad = None

        def run() -> None:
            with torch.set_grad_enabled(backward):
                y = candidate.run(x)
                if backward:
                    y.backward(upstream)

        return run

    return prepare


def _budget(tokens: int, options: argparse.Namespace) -> Budget:
    """Few rounds for runs of a second and more; their spread is small beside it."""
    if tokens > 4096:
        return Budget(options.seconds, warmups=1, min_rounds=2)
    return Budget(options.seconds, max_rounds=200 if tokens <= 16 else 50)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 0 also when a goal is missed: the table says so."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    shape = SHAPES[options.shape]
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    record: dict[str, Any] = {
        "benchmark": "layer",
        "mode": options.kind,
        "environment": environment(device),
        "settings": {"shape": options.shape, "dtype": options.dtype, **asdict(shape)},
        "gemm_flops_per_second": gemm_flops_per_second(device, getattr(torch, options.dtype)),
        "bytes_per_second": bytes_per_second(device),
        "import_seconds": {name: import_seconds(name, options.imports) for name in ("torch", "moe")},
    }
    results = [asdict(result) for result in measure_sizes(shape, options, log)]
    record["results"] = results
    record["goals"] = judge(record)
    print(layer_tables.render(record))
    if not options.no_save:
        name = "layer" if options.kind == FULL else f"layer_{options.kind}"
        print(f"\nwritten: {save(name, record, options.results)}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few sizes, two minutes")
    parser.add_argument("--shape", choices=SHAPES, default="cpu_small")
    parser.add_argument("--tokens", type=_numbers, help="such as 1,2048")
    parser.add_argument("--experts", type=_numbers, help="such as 16,256")
    parser.add_argument("--load", choices=("balanced", "zipf", "both"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--seconds", type=float, help="time for one cell, not counting slow candidates")
    parser.add_argument("--imports", type=int, default=5, help="runs of each import that is timed")
    parser.add_argument("--results", type=Path, help="folder of the JSON file")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args(argv)
    options.kind = kind_of(parser, options, quick=options.quick)
    options.tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    options.experts = options.experts or (QUICK_EXPERTS if options.quick else EXPERTS)
    options.seconds = options.seconds or (1.0 if options.quick else 2.0)
    load = options.load or ("balanced" if options.quick else "both")
    options.loads = {"balanced": (False,), "zipf": (True,), "both": (False, True)}[load]
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
