"""The least time a MoE layer can take: what each pass computes and moves, over what the GPU can do.

    python -m benchmarks.roofline --shape qwen3_30b --tokens 8192 --gpu h100
    python -m benchmarks.roofline --tokens 128 --dense-tflops 700       at a measured rate of matrix products

A pass takes at least its floating-point operations over the dense matrix rate, and at least its bytes over
the memory bandwidth, each operand read once and each result written once; a layer the sum of its passes.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.record import table
from benchmarks.shapes import SHAPES, SONIC_SHAPES, Shape

FORWARD = ("routing", "up", "down", "combine")
BACKWARD = ("grad_pre", "grad_down", "grad_rows", "reduce", "grad_up")
ALL_SHAPES = SHAPES | SONIC_SHAPES


@dataclass(frozen=True, slots=True)
class Gpu:
    """Dense bf16 FLOP/s (without structured sparsity) and bytes/s of a datasheet; the words of its name."""

    name: str
    flops: float
    bytes_per_second: float
    words: tuple[str, ...]
    source: str


GPUS = {
    "h100": Gpu("H100 SXM", 989.4e12, 3.35e12, ("h100",), "NVIDIA H100 datasheet; half of 1979, sparse"),
    "h100_pcie": Gpu("H100 PCIe", 756e12, 2.0e12, ("h100", "pcie"), "NVIDIA H100 datasheet; half of 1513"),
    "h200": Gpu("H200 SXM", 989.4e12, 4.8e12, ("h200",), "NVIDIA H200 datasheet; half of 1979, sparse"),
    "a100": Gpu("A100 SXM 80 GB", 312e12, 2.039e12, ("a100",), "NVIDIA A100 datasheet"),
    "b200": Gpu("B200 SXM", 2.25e15, 8.0e12, ("b200",), "NVIDIA HGX B200 datasheet; half of 4500, sparse"),
    "mi300x": Gpu("MI300X", 1307.4e12, 5.3e12, ("mi300x",), "AMD Instinct MI300X datasheet"),
}


@dataclass(frozen=True, slots=True)
class Work:
    """What one pass must do: operations and bytes through device memory."""

    name: str
    flops: float
    bytes: float

    def compute_s(self, flops_per_second: float) -> float:
        """Seconds if only arithmetic took time."""
        return self.flops / flops_per_second

    def memory_s(self, bytes_per_second: float) -> float:
        """Seconds if only moving bytes took time."""
        return self.bytes / bytes_per_second

    def floor_s(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The larger of the two."""
        return max(self.compute_s(flops_per_second), self.memory_s(bytes_per_second))


def works(
    shape: Shape, tokens: int, *, keep: bool = True, item: int = 2, active: int | None = None
) -> dict[str, Work]:
    """Every pass of a layer with gated experts, forward first; `item` bytes a number.

    keep: the forward writes the pre-activation that the backward needs; False for inference.
    active: experts that have a row, whose weights are read; at most min(e, p), which is taken by default. The
    gradients of all e are written. Biases and routing weights are left out: they are less than a thousandth.
    """
    d, h, e, p = shape.d, shape.h, shape.e, tokens * shape.k
    hit = min(e, p) if active is None else active
    x, hidden, rows, weights = tokens * d, p * h, p * d, d * h  # numbers in each
    product = 2.0 * p * d * h  # operations of one matrix of d h numbers met by all rows
    passes = (
        Work("routing", 0.0, 8.0 * 3 * p),  # int64: ids are read, both directions of the order written
        Work("up", 2 * product, item * (x + hit * 2 * weights + hidden + (2 * hidden if keep else 0))),
        Work("down", product, item * (hidden + hit * weights + rows)),
        Work("combine", 2.0 * rows, item * (rows + x)),
        Work("grad_pre", product, item * (x + hit * weights + 2 * hidden + 2 * hidden + hidden)),
        Work("grad_down", product, item * (x + hidden + e * weights)),
        Work("grad_rows", 2 * product, item * (2 * hidden + hit * 2 * weights + rows)),
        Work("reduce", 1.0 * rows, item * (rows + x)),
        Work("grad_up", 2 * product, item * (x + 2 * hidden + e * 2 * weights)),
    )
    return {work.name: work for work in passes}


def floor_s(passes: Iterable[Work], flops_per_second: float, bytes_per_second: float) -> float:
    """The floor of some passes, one after the other."""
    return sum(work.floor_s(flops_per_second, bytes_per_second) for work in passes)


def layer_floor_s(
    shape: Shape,
    tokens: int,
    flops_per_second: float,
    bytes_per_second: float,
    *,
    backward: bool,
    item: int = 2,
    active: int | None = None,
) -> float:
    """The floor of an inference forward, or of forward + backward."""
    passes = works(shape, tokens, keep=backward, item=item, active=active)
    names = FORWARD + BACKWARD if backward else FORWARD
    return floor_s((passes[name] for name in names), flops_per_second, bytes_per_second)


def moved_bytes(shape: Shape, tokens: int, *, item: int = 2, active: int | None = None) -> float:
    """Bytes of an inference forward."""
    passes = works(shape, tokens, keep=False, item=item, active=active)
    return sum(passes[name].bytes for name in FORWARD)


def datasheet_of(device_name: str) -> Gpu | None:
    """The datasheet of a device that calls itself so: the one with most words in its name, or None."""
    name = device_name.lower()
    fitting = [gpu for gpu in GPUS.values() if all(word in name for word in gpu.words)]
    return max(fitting, key=lambda gpu: len(gpu.words), default=None)


def render(passes: dict[str, Work], flops_per_second: float, bytes_per_second: float) -> str:
    """The table of passes with the totals of forward, backward and both."""
    head = ["pass", "GFLOP", "MB", "FLOP/byte", "compute µs", "memory µs", "floor µs", "bound by", "TFLOP/s"]
    rows = [_row(work.name, [work], flops_per_second, bytes_per_second) for work in passes.values()]
    totals = {"forward": FORWARD, "backward": BACKWARD, "both": FORWARD + BACKWARD}
    rows += [
        _row(name, [passes[n] for n in names], flops_per_second, bytes_per_second)
        for name, names in totals.items()
        if all(n in passes for n in names)
    ]
    return table(head, rows)


def _row(name: str, group: list[Work], flops_per_second: float, bytes_per_second: float) -> list[str]:
    flops, moved = sum(w.flops for w in group), sum(w.bytes for w in group)
    compute, memory = flops / flops_per_second, moved / bytes_per_second
    floor = floor_s(group, flops_per_second, bytes_per_second)
    bound = ("compute" if compute > memory else "memory") if len(group) == 1 else ""
    numbers = (flops / 1e9, moved / 1e6, flops / moved, 1e6 * compute, 1e6 * memory, 1e6 * floor)
    shown = [f"{number:.1f}" for number in numbers]
    return [name, *shown, bound, f"{flops / floor / 1e12:.0f}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=ALL_SHAPES, default="qwen3_30b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--dense-tflops", type=float, help="a measured rate instead of the datasheet's")
    parser.add_argument("--tb-per-second", type=float, help="a measured bandwidth instead of the datasheet's")
    parser.add_argument("--item", type=int, default=2, help="bytes a number: 2 for bfloat16")
    parser.add_argument("--inference", action="store_true", help="forward only; nothing is kept")
    options = parser.parse_args(argv)
    shape, gpu = ALL_SHAPES[options.shape], GPUS[options.gpu]
    rate = options.dense_tflops * 1e12 if options.dense_tflops else gpu.flops
    bandwidth = options.tb_per_second * 1e12 if options.tb_per_second else gpu.bytes_per_second
    passes = works(shape, options.tokens, keep=not options.inference, item=options.item)
    if options.inference:
        passes = {name: passes[name] for name in FORWARD}
    print(
        f"{options.shape}: d={shape.d} h={shape.h} e={shape.e} k={shape.k}, t={options.tokens}; {gpu.name} "
        f"({gpu.source}), at {rate / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.2f} TB/s\n"
    )
    print(render(passes, rate, bandwidth))
    return 0


if __name__ == "__main__":
    sys.exit(main())
