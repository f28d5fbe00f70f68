"""What is measured, in the order in which it tells most, and who takes part in it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu_candidates import (
    COMPILED,
    DENSE,
    GROUPED_MM,
    LIGER,
    MOE_OPS,
    OURS,
    OURS_SORTED,
    TRANSFORMERS,
    TUNING_S,
)
from benchmarks.roofline import ALL_SHAPES, layer_floor_s
from benchmarks.shapes import SONIC_SHAPES, Shape, sonic_tokens

SHAPES = ("qwen3_30b", "olmoe", "mixtral", "gpt_oss_20b", "deepseek_v3")
TOKENS = (1, 16, 128, 1024, 8192, 32768)
FEW_TOKENS = 128  # up to here launches count: runs start on an idle GPU, and are timed in a CUDA graph too
COMPILED_TOKENS = (128, 8192)  # each size is compiled anew
TINY = Shape(d=32, h=32, e=4, k=2)  # for trying the benchmark itself on a CPU
NAMED = ALL_SHAPES | {"tiny": TINY}
EVERYONE = (DENSE, OURS, OURS_SORTED, GROUPED_MM, COMPILED, TRANSFORMERS, LIGER, MOE_OPS)
USED_MEMORY = 0.92  # of the GPU's memory, at most, by prediction
RUNS = 15  # of a candidate in a mode, at least
SLOWER = 2.5  # than the floor, a candidate on average
TUNING_SHARE = 0.3  # of the time left, at most, for a candidate that tunes itself


@dataclass(frozen=True, slots=True)
class Cell:
    """One size. kind: "layer", everyone in turns; "passes", ours one by one; "operations", level 1."""

    shape: str
    tokens: int
    zipf: bool = False
    kind: str = "layer"

    @property
    def is_sonic(self) -> bool:
        """Whether it is one of SonicMoE's published sizes."""
        return self.shape in SONIC_SHAPES

    def __str__(self) -> str:
        load = "Zipf" if self.zipf else "balanced"
        return f"{self.shape} t={self.tokens} {load}" + ("" if self.kind == "layer" else f", {self.kind}")


# First what the goals are about.
FIRST = (
    Cell("qwen3_30b", 8192),
    Cell("qwen3_30b", 8192, kind="passes"),
    Cell("olmoe", 8192),
    Cell("mixtral", 8192),
    Cell("gpt_oss_20b", 8192),
    Cell("qwen3_30b", 128),
    Cell("qwen3_30b", 1),
    Cell("qwen3_30b", 16),
    Cell("qwen3_30b", 32768),
    *(Cell(name, sonic_tokens(name)) for name in SONIC_SHAPES),
    Cell("qwen3_30b", 8192, kind="operations"),
    Cell("qwen3_30b", 8192, zipf=True),
    Cell("deepseek_v3", 8192),
    *(Cell(name, 8192, kind="passes") for name in SHAPES[1:]),
)
QUICK = (FIRST[0], FIRST[1], FIRST[2], FIRST[5], FIRST[6])


def all_cells() -> list[Cell]:
    """Everything: the first ones, then every shape at every number of tokens, then skewed loads."""
    grid = [Cell(name, tokens) for tokens in (1024, 128, 1, 16, 8192, 32768) for name in SHAPES]
    skewed = [Cell(name, 8192, zipf=True) for name in SHAPES]
    return list(dict.fromkeys([*FIRST, *grid, *skewed]))


def chosen_cells(shapes: Sequence[str] | None, tokens: Sequence[int] | None, *, quick: bool) -> list[Cell]:
    """The cells that fit the options; a number of tokens or a shape that no cell has makes new ones."""
    cells = list(QUICK) if quick and not (shapes or tokens) else all_cells()
    if shapes:
        known = {cell.shape for cell in cells}
        kinds = ("layer", "passes", "operations")
        new = [name for name in shapes if name not in known]
        cells += [Cell(name, t, kind=kind) for name in new for t in (tokens or (16,)) for kind in kinds]
        cells = [cell for cell in cells if cell.shape in shapes]
    if tokens:
        have = {(cell.shape, cell.tokens) for cell in cells}
        names = dict.fromkeys(cell.shape for cell in cells)
        cells += [Cell(name, t) for t in tokens for name in names if (name, t) not in have]
        cells = [cell for cell in cells if cell.tokens in tokens]
    return cells


def participants(cell: Cell) -> list[str]:
    """Who is timed in a cell."""
    if cell.is_sonic:
        return [DENSE, OURS, OURS_SORTED, GROUPED_MM]
    return [name for name in EVERYONE if name != COMPILED or cell.tokens in COMPILED_TOKENS]


def memory_needed(shape: Shape, tokens: int, *, backward: bool, item: int = 2) -> float:
    """Bytes that our own layer needs: weights and gradients, what is kept, what is there for a while."""
    d, h, p = shape.d, shape.h, tokens * shape.k
    weights = shape.e * shape.expert_numbers * (2 if backward else 1)
    return item * (weights + p * (6 * h + 2 * d) + 6 * tokens * d) + 4 * 8 * shape.expert_numbers


def why_not_memory(cell: Cell, total: float, *, backward: bool, item: int) -> str | None:
    """Why a cell does not fit into the memory of the GPU, or None."""
    needed = memory_needed(NAMED[cell.shape], cell.tokens, backward=backward, item=item)
    if needed <= USED_MEMORY * total:
        return None
    return f"needs about {needed / 2**30:.0f} GiB of the {total / 2**30:.0f} GiB"


def seconds_needed(cell: Cell, flops_per_second: float, bytes_per_second: float, budget_s: float) -> float:
    """How long a cell takes, roughly, without candidates that compile or tune themselves."""
    shape = NAMED[cell.shape]
    floors = [
        layer_floor_s(shape, cell.tokens, flops_per_second, bytes_per_second, backward=backward)
        for backward in (False, True)
    ]
    if cell.kind != "layer":
        return 3 + 20 * sum(floors)
    slow = len(participants(cell)) * RUNS * SLOWER * sum(floors)
    return 3 + max(slow, 2 * budget_s)


def why_not_time(name: str, *, tuned: bool, compiled: bool, left_s: float) -> str | None:
    """Why a candidate that compiles or tunes itself for a shape gets no row, or None.

    tuned: it has done so for this shape. compiled: its kernels were compiled ahead.
    """
    if name not in TUNING_S or tuned:
        return None
    seconds = TUNING_S[name][0 if compiled else 1]
    if seconds <= TUNING_SHARE * left_s:
        return None
    return f"takes about {seconds:.0f} s to tune itself to a shape, {left_s:.0f} s were left"


def key(cell: Cell) -> dict[str, Any]:
    """A cell as plain data."""
    return asdict(cell)
