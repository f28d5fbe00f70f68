"""Which tile, how many warps, how deep a pipeline: data, looked up from shapes alone; nothing is timed here.

A table row says for one pass on one architecture: up to so many rows an expert, for experts of this size
class, take this schedule. Of the rows that fit the one with the lowest bound is taken; of two with the same
bound the user's own (benchmarks.tune writes them) before the package's. Where none fits, `heuristic` answers.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .launch import Target

Pass = Literal["up", "down", "grad_pre", "grad_rows", "grad_down", "grad_up"]
Size = Literal["small", "large"]
PASSES: tuple[Pass, ...] = get_args(Pass)
LARGE = 4 << 20  # numbers in one projection d h from which an expert counts as large
MOST_ROWS = 1024  # batch-invariant schedules are those of this many rows an expert
TABLES = Path(__file__).parent / "tables"
# Architectures without a table of their own, and the one with the same registers, memories and matrix units.
RELATIVES = {"sm_103": "sm_100", "gfx90a": "gfx942", "gfx950": "gfx942"}
FOLDER = "MOE_TRITON_TABLES"  # environment variable: the folder of the user's own rows


@dataclass(frozen=True, slots=True)
class Config:
    """The schedule of one pass.

    rows, outs, ins  tile of the rows, outputs and inputs; the one that is summed over is the step of the loop
    group            row tiles of an expert that run side by side, so that they share a weight tile in the L2
    persistent       (down, grad_rows) each program walks over many tiles, instead of one; the passes that
                     gather rows spill in that form
    tma              weights and other dense operands by the tensor memory accelerator, where shapes allow it
    swap             the weight is the left operand: tiles of fewer than 64 rows still fill Hopper's wgmma
    programs         that a multiprocessor holds at once, by registers and shared memory: the schedule counts
                     on it, a persistent grid has so many, and benchmarks.compiled checks it
    splits           parts into which the summed axis is cut, added up later in a fixed order (few tiles only)
    registers        the most of a thread, so that more programs fit; 0: as the compiler chooses
    """

    rows: int
    outs: int
    ins: int
    num_warps: int
    num_stages: int
    group: int = 8
    persistent: bool = False
    tma: bool = True
    swap: bool = False
    programs: int = 1
    splits: int = 1
    registers: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "outs", "ins", "num_warps", "num_stages", "group", "programs", "splits"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        if not isinstance(self.registers, int) or self.registers < 0:
            raise ValueError(f"registers={self.registers!r} must be a positive integer, or 0 for no limit.")
        for name in ("rows", "outs", "ins"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(
                    f"{name}={value} must be a power of two, at least 16: the least that tl.dot takes."
                )

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    def whole(self) -> "Config":
        """The same schedule without splits."""
        return self if self.splits == 1 else replace(self, splits=1)


_overrides: dict[Pass, Config] = {}


@contextmanager
def override(what: Pass, config: Config) -> Iterator[None]:
    """Take this schedule for one pass, whatever the shapes: for tuning and for tests.

    In all threads: autograd runs the backward pass of a GPU in a thread of its own.
    """
    before = _overrides.get(what)
    _overrides[what] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[what]
        else:
            _overrides[what] = before


def choose_config(
    what: Pass,
    target: Target,
    dtype: torch.dtype,
    pairs: int,
    num_experts: int,
    d: int,
    h: int,
    *,
    batch_invariant: bool = False,
) -> Config:
    """The schedule of a pass over p pairs of e experts (d -> h -> d).

    batch_invariant: the same schedule for every number of pairs.
    """
    if what in _overrides:
        return _overrides[what]
    rows = MOST_ROWS if batch_invariant else max(1, pairs // max(1, num_experts))
    is_aligned = d * dtype.itemsize % 16 == 0 and h * dtype.itemsize % 16 == 0
    size: Size = "small" if d * h < LARGE else "large"
    config = _look_up(what, target, dtype, rows, size, is_aligned, os.environ.get(FOLDER))
    return config if batch_invariant else _split(config, what, target, pairs, num_experts, d, h)


@lru_cache(maxsize=4096)
def _look_up(
    what: Pass,
    target: Target,
    dtype: torch.dtype,
    rows: int,
    size: Size,
    is_aligned: bool,
    folder: str | None,
) -> Config:
    if dtype.itemsize == 2 and is_aligned:
        table = [*read_table(user_table(target, folder)), *read_table(shipped_table(target))]
        fitting = [row for row in table if _fits(row, what, rows, size)]
        if fitting:
            return Config(**min(fitting, key=_bound)["config"])  # of equal bounds the first, the user's own
    return heuristic(what, target, dtype, rows)


def _fits(row: dict[str, Any], what: Pass, rows: int, size: Size) -> bool:
    return row["pass"] == what and row["size"] in (size, None) and rows <= _bound(row)


def _bound(row: dict[str, Any]) -> float:
    return float("inf") if row["max_rows_per_expert"] is None else row["max_rows_per_expert"]


def shipped_table(target: Target) -> Path:
    """Where the package's rows for this target are: its own, or those of a relative."""
    own = TABLES / f"{target.name}.json"
    relative = RELATIVES.get(target.name)
    return own if relative is None or own.exists() else TABLES / f"{relative}.json"


def user_table(target: Target, folder: str | None = None) -> Path:
    """Where a user's own rows are: in `folder`, $MOE_TRITON_TABLES or ~/.cache/sparse-moe/tables."""
    folder = folder or os.environ.get(FOLDER)
    return (
        Path(folder) if folder else Path.home() / ".cache" / "sparse-moe" / "tables"
    ) / f"{target.name}.json"


def what_schedules_depend_on() -> tuple[Any, ...]:
    """Equal as long as `choose_config` answers the same question in the same way."""
    return (os.environ.get(FOLDER), _times_forgotten, *_overrides.items())


_times_forgotten = 0


def forget_tables() -> None:
    """Read the tables anew at the next call: somebody has written rows."""
    global _times_forgotten
    _times_forgotten += 1
    _look_up.cache_clear()


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table file; none where there is no file.

    Raises:
        ValueError: a file that is not a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    try:
        rows = json.loads(text)
        for row in rows:
            Config(**row["config"])
            if row["pass"] not in PASSES or row["size"] not in (*get_args(Size), None):
                raise ValueError(f"pass={row['pass']!r}, size={row['size']!r}")
            _bound(row)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no table of schedules ({error}). Mend it, or delete it.") from error
    return rows


def heuristic(what: Pass, target: Target, dtype: torch.dtype, rows: int) -> Config:
    """A schedule for what no table knows: the tile as high as an expert has rows, as wide as fits.

    Sizes whose rows do not start at multiples of 16 bytes come here too: loaded in small pieces, larger tiles
    would need more registers than there are.
    """
    loops_over_rows = what in ("grad_down", "grad_up")
    if dtype.itemsize != 2:
        return Config(32, 64, 64 if loops_over_rows else 16, 4, 2, tma=False)
    if loops_over_rows:
        return Config(32, 128, 128, 8, 2, group=4)
    tile = min(128, max(16, 1 << (rows - 1).bit_length()))
    swap = tile < 64 and target.kind == "cuda" and int(target.arch) >= 90
    return Config(tile, 64 if tile == 128 else 128, 32, 8 if tile == 128 else 4, 2, swap=swap)


def _split(
    config: Config, what: Pass, target: Target, pairs: int, num_experts: int, d: int, h: int
) -> Config:
    """Cut the summed axis of the down-projection while tiles fill less than half the multiprocessors."""
    if what != "down" or pairs == 0:
        return config
    tiles = min(pairs, num_experts + pairs // config.rows) * -(-d // config.outs)
    splits = config.splits
    while splits < 8 and 2 * tiles * splits <= target.units and h >= 4 * splits * config.ins:
        splits *= 2
    return config if splits == config.splits else replace(config, splits=splits)


def as_row(
    what: Pass, max_rows: int | None, size: Size | None, config: Config, measured: dict[str, Any] | None
) -> dict[str, Any]:
    """A table row as plain data."""
    return {
        "pass": what,
        "max_rows_per_expert": max_rows,
        "size": size,
        "config": {f.name: getattr(config, f.name) for f in fields(config)},
        "measured": measured,
    }
