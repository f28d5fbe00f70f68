"""Which schedules are worth trying, and how the best ones are kept: no GPU is needed for any of this."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.gpu_store import write_text
from moe_triton.config import LARGE, MOST_ROWS, PASSES, Config, Pass, Size, as_row, read_table
from moe_triton.launch import Target

OVER_ROWS: tuple[Pass, ...] = ("grad_down", "grad_up")  # their loop runs over an expert's rows
DENSE_OPERANDS: tuple[Pass, ...] = ("down", "grad_rows")  # nothing is gathered: they may be persistent
# Shared memory of one block in KiB, by compute capability (CUDA C++ programming guide, table of limits).
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
AMD_SHARED_KIB = 64
ACCUMULATORS = (
    160  # registers of a thread, of 255, that sums may take; the rest is for addresses and operands
)
REGISTERS, TWO_PROGRAMS = 65536, 128  # of a multiprocessor; of a thread, so that two programs of 8 warps fit
FUSED_ACCUMULATORS = 128  # grad_pre computes the activation and its derivative beside them


def first_round(what: Pass, target: Target, rows_per_expert: int, *, gated: bool = True) -> list[Config]:
    """Tiles, warps and pipeline depths that fit, for so many rows an expert."""
    if what in OVER_ROWS:
        tiles = product((32, 64, 128), (64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4))
    else:
        height = min(128, max(16, 1 << (max(1, rows_per_expert) - 1).bit_length()))
        heights = sorted({max(16, height // 2), height, min(128, 2 * height)})
        few = height < 64
        tiles = product(
            heights,
            (32, 64, 128) if few else (64, 128, 256),
            (64, 128, 256) if few else (32, 64),
            (4, 8),
            (3, 4),
        )
    found = [Config(*tile, swap=_swaps(what, target, tile[0])) for tile in tiles]
    return [c for c in found if fits(what, c, target, gated=gated) and _fills_the_warps(what, c)]


def variations(what: Pass, config: Config, target: Target, *, gated: bool = True) -> list[Config]:
    """The neighbours of a good schedule: how tiles are ordered, loaded and walked over."""
    found = [replace(config, group=group) for group in (1, 4, 16)]
    found += [replace(config, tma=not config.tma), replace(config, num_stages=config.num_stages + 1)]
    if what in DENSE_OPERANDS:
        found.append(replace(config, persistent=not config.persistent))
    if what not in OVER_ROWS and config.rows < 64:
        found.append(replace(config, swap=not config.swap))
    if target.kind == "cuda" and 32 * config.num_warps * TWO_PROGRAMS == REGISTERS // 2:
        found.append(replace(config, registers=0 if config.registers else TWO_PROGRAMS))
    return [c for c in found if c != config and fits(what, c, target, gated=gated)]


def fits(what: Pass, config: Config, target: Target, *, gated: bool = True) -> bool:
    """Whether the operands of all stages fit into shared memory and the sums into registers."""
    most = FUSED_ACCUMULATORS if what == "grad_pre" else ACCUMULATORS
    return shared_bytes(what, config, gated=gated) <= shared_limit(target) and (
        accumulators(what, config, gated=gated) <= most
    )


def shared_bytes(what: Pass, config: Config, *, gated: bool = True, item: int = 2) -> int:
    """Shared memory of the pipeline: one tile of each operand for every stage."""
    if what in OVER_ROWS:
        return config.num_stages * (config.outs + config.ins) * config.rows * item
    weights = 2 * config.outs if what == "up" and gated else config.outs
    return config.num_stages * (config.rows + weights) * config.ins * item


def accumulators(what: Pass, config: Config, *, gated: bool = True) -> int:
    """float32 sums that a thread holds; the up-projection sums gate and up side by side."""
    tile = config.outs * config.ins if what in OVER_ROWS else config.rows * config.outs
    return tile * (2 if what == "up" and gated else 1) // (32 * config.num_warps)


def shared_limit(target: Target) -> int:
    """Bytes of shared memory that a block may have."""
    kib = SHARED_KIB.get(int(target.arch), 99) if target.kind == "cuda" else AMD_SHARED_KIB
    return kib * 1024


def _swaps(what: Pass, target: Target, rows: int) -> bool:
    """Hopper's matrix units take 64 rows: fewer go to the other side."""
    return what not in OVER_ROWS and rows < 64 and target.kind == "cuda" and int(target.arch) >= 90


def _fills_the_warps(what: Pass, config: Config) -> bool:
    """At least 512 sums a warp: smaller tiles load more than they multiply."""
    tile = config.outs * config.ins if what in OVER_ROWS else config.rows * config.outs
    return tile >= 512 * config.num_warps


def row_bound(rows_per_expert: int) -> int | None:
    """Up to how many rows an expert a measurement speaks for: the next power of two; None for many."""
    return None if rows_per_expert >= MOST_ROWS else 1 << (max(1, rows_per_expert) - 1).bit_length()


def size_of(d: int, h: int) -> Size:
    """The size class of an expert, as `moe_triton.config` has it."""
    return "small" if d * h < LARGE else "large"


def merged(rows: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a table with new ones in the place of those they replace, in a fixed order."""
    by_key = {_key(row): row for row in (*rows, *new)}
    return [by_key[key] for key in sorted(by_key)]


def _bound(row: dict[str, Any]) -> float:
    return float("inf") if row["max_rows_per_expert"] is None else row["max_rows_per_expert"]


def _key(row: dict[str, Any]) -> tuple[int, float, str]:
    """In the order of the passes, then from few rows an expert to many; one size before any size."""
    return PASSES.index(row["pass"]), _bound(row), row["size"] or "~any"


def write_rows(path: Path, new: Iterable[dict[str, Any]]) -> None:
    """Add rows to a table file, which is replaced in one step; its other rows stay.

    Raises:
        ValueError: the file is there and is not a table.
    """
    rows = merged(read_table(path), new)
    write_text(path, "[\n" + ",\n".join(_lines(rows)) + "\n]\n")


def _lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One line a row, so that a change of one is a change of one line."""
    return (" " + json.dumps(row) for row in rows)


def fastest_for_all(times: Sequence[Mapping[Config, float]]) -> Config:
    """Of the schedules timed at every size the one with the least mean of its time over the best there."""
    common = [config for config in times[0] if all(config in ms for ms in times)]
    return min(common, key=lambda config: sum(ms[config] / min(ms.values()) for ms in times))


def winner_row(
    what: Pass, rows_per_expert: int, d: int, h: int, config: Config, measured: dict[str, Any]
) -> dict[str, Any]:
    """The table row of a schedule that was the fastest here; splits follow from the number of tiles."""
    return as_row(what, row_bound(rows_per_expert), size_of(d, h), config.whole(), measured)
