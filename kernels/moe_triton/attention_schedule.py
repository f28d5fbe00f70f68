"""How attention over a cache is laid over a device: which tile, and into how many parts the keys are cut.

Many query rows fill the device by themselves: each program walks over all keys of its rows. A few rows would
leave it idle, so the keys are cut into parts with programs of their own, and the results of the parts are
merged. Everything follows from shapes and from the number of multiprocessors; nothing is timed here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from .launch import Target, ceil_div

# NVIDIA's matrix units cut a sum off after 24 bits, always towards zero: over n steps of 16 keys of equal
# weight up to n 2⁻²⁵ of it is lost, here 0.02 %. Longer sums are sums of such, added up with rounding.
PASS_KEYS = 1 << 17
FEWEST_STEPS = 4  # of a part, or its start and its end would be most of it
MOST_WAVES = 8  # one after the other; beyond, a last one that is half empty costs little
ENOUGH = 0.9  # of the device at work, on average over the waves
WORKSPACE = 256 << 20  # bytes that the results of all parts may take


@dataclass(frozen=True, slots=True)
class Schedule:
    """A tile, and the parts.

    rows, keys  query rows of a program, keys of a step of its loop
    programs    that a multiprocessor holds at once, by registers and shared memory; benchmarks.compiled
                checks it
    splits      parts of the keys; 1: each program walks over all keys
    pass_keys   the most keys that a program sums up; more keys than that times splits take several launches
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int = 1
    splits: int = 1
    pass_keys: int = PASS_KEYS

    def __post_init__(self) -> None:
        for name in ("rows", "keys"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(
                    f"{name}={value} must be a power of two, at least 16: the least that tl.dot takes."
                )
        if self.splits < 1 or self.pass_keys < self.keys or self.pass_keys % self.keys:
            raise ValueError(
                f"splits={self.splits} must be at least 1, and pass_keys={self.pass_keys} a multiple of "
                f"keys={self.keys}: a part or a pass is a whole number of steps."
            )

    def part_keys(self, keys: int) -> int:
        """Keys of each part but the last, of so many that one launch has."""
        return ceil_div(ceil_div(keys, self.keys), self.splits) * self.keys

    def parts(self, keys: int) -> int:
        """Parts that have a key: splits, or fewer where those are rounded up to whole steps."""
        return ceil_div(keys, self.part_keys(keys))


# By most channels: tiles by rising rows. The first with a place for all rows is taken, else the last. 64 rows
# are the least that wgmma and tcgen05 take.
ACCELERATED = {
    64: (Schedule(64, 64, 4, 4, 3), Schedule(128, 64, 4, 3, 2)),
    128: (Schedule(64, 64, 4, 3, 2), Schedule(128, 128, 8, 2)),
    256: (Schedule(64, 64, 8, 2), Schedule(128, 32, 8, 2)),
}
AMPERE = {
    64: (Schedule(16, 64, 4, 3, 4), Schedule(64, 64, 4, 3, 3), Schedule(128, 64, 8, 3)),
    128: (Schedule(16, 64, 4, 3, 2), Schedule(64, 32, 4, 3, 2), Schedule(128, 64, 8, 2)),
    256: (Schedule(16, 32, 4, 3, 2), Schedule(64, 32, 8, 2)),
}
UNALIGNED = {  # what starts at no multiple of 16 bytes is loaded through registers
    64: (Schedule(64, 32, 4, 3, 3),),
    128: (Schedule(64, 32, 8, 2),),
    256: (Schedule(64, 16, 8, 2),),
}
AMD = {
    64: (Schedule(16, 64, 4, 1, 4), Schedule(64, 64, 4, 2, 2), Schedule(128, 64, 4, 2, 2)),
    128: (Schedule(16, 32, 4, 2, 3), Schedule(64, 32, 4, 2, 2), Schedule(128, 32, 8, 2)),
    256: (Schedule(16, 16, 4, 2, 3), Schedule(64, 16, 4, 2, 2)),
}
EXACT = {  # float32: products without matrix units hold their operands in registers
    64: (Schedule(32, 16, 4, 2, 2),),
    128: (Schedule(16, 16, 4, 2, 3),),
    256: (Schedule(16, 16, 4, 2),),
}
INTERPRETED = {256: (Schedule(16, 16, 4, 1),)}

_override: list[Schedule] = []


@contextmanager
def override(schedule: Schedule) -> Iterator[None]:
    """Take this schedule whatever the shapes: for tuning and for tests."""
    _override.append(schedule)
    try:
        yield
    finally:
        _override.pop()


def tiles_of(
    target: Target, dtype: torch.dtype, channels: int, *, aligned: bool = True
) -> tuple[Schedule, ...]:
    """The tiles for caches of this dtype and so many channels, aligned (`tiles.can_describe`) or not."""
    if target.kind == "cpu":
        table = INTERPRETED
    elif dtype == torch.float32:
        table = EXACT
    elif target.kind == "hip":
        table = AMD
    elif aligned:
        table = ACCELERATED if int(target.arch) >= 90 else AMPERE
    else:
        table = UNALIGNED
    return table[min(most for most in table if channels <= most)]


def choose_schedule(
    target: Target,
    dtype: torch.dtype,
    rows: int,
    heads: int,
    keys: int,
    channels: int,
    *,
    aligned: bool = True,
) -> Schedule:
    """The schedule for so many query rows a head of keys, heads, keys of a head and channels."""
    if _override:
        return _override[-1]
    tiles = tiles_of(target, dtype, channels, aligned=aligned)
    tile = next((tile for tile in tiles if tile.rows >= rows), tiles[-1])
    return cut(tile, target, rows, heads, keys, channels)


def cut(tile: Schedule, target: Target, rows: int, heads: int, keys: int, channels: int) -> Schedule:
    """The tile, with as many parts of the keys as fill the device."""
    programs = ceil_div(rows, tile.rows) * heads
    splits = _splits_that_fill(target.units * tile.programs, programs)
    most = min(keys // (FEWEST_STEPS * tile.keys), WORKSPACE // (rows * heads * channels * 4))
    return replace(tile, splits=max(1, min(splits, most)))


def _splits_that_fill(at_once: int, programs: int) -> int:
    """Parts with which whole waves of programs fill the device, or nearly."""
    best, splits = 0.0, 1
    for waves in range(1, MOST_WAVES + 1):
        parts = at_once * waves // programs
        if (share := parts * programs / (at_once * waves)) > best:
            best, splits = share, parts
        if best >= ENOUGH:
            break
    return splits
