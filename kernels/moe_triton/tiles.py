"""Tiles of rows: which expert owns which, and how a kernel finds, loads and multiplies its own.

Every GEMM over rows has tiles of ROWS x OUTS. An expert with n rows has ceil(n / ROWS) of them, one under the
other; tile numbers run over the experts in order, and inside an expert in groups of GROUP row tiles, so that
programs that run together share weight tiles and rows in the L2 cache. The number of tiles is known on the
device only; the grid has the largest number that the shapes allow, and spare programs end at once.
"""

# In kernel bodies types are Triton's.
# pyright: reportArgumentType=false

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Config
from .launch import INTERPRETED, launch, power_of_2, target_of

UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies the raw bits of bf16
RECORD = tl.constexpr(8)  # numbers of a tile's record, five of them used: 32 bytes, the least that is read
SEARCHED_PAIRS = 1024  # up to here a program finds its expert by itself, which saves the launch of the map


@triton.jit(do_not_specialize=["BOUND"])
def tile_map_kernel(
    offsets_ptr, tiles_ptr,  # (e+1), (1 + bound, RECORD)
    E, BOUND, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i writes what each tile of expert i needs to know, so that it waits for one reading only.

    Record 0: number of tiles. Record 1 + tile: expert, its first tile, its tiles, its first row, its end.
    Spare tiles, which program e writes, have expert e.
    """
    i = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    is_expert = experts < E
    starts = tl.load(offsets_ptr + experts, mask=is_expert, other=0)
    ends = tl.load(offsets_ptr + experts + 1, mask=is_expert, other=0)
    tiles = (ends - starts + ROWS - 1).to(tl.int32) // ROWS
    first = tl.sum(tl.where(experts < i, tiles, 0))
    own = tl.sum(tl.where(experts == i, tiles, 0))
    last = first + own
    if i == E:
        tl.store(tiles_ptr, first)
        last = BOUND
    start = tl.load(offsets_ptr + i).to(tl.int32)
    end = tl.load(offsets_ptr + tl.minimum(i + 1, E)).to(tl.int32)
    for at in range(first, last, BLOCK):
        tile = at + tl.arange(0, BLOCK)
        record = tiles_ptr + (1 + tile) * RECORD
        tl.store(record, tl.full((BLOCK,), i, tl.int32), mask=tile < last)
        tl.store(record + 1, tl.full((BLOCK,), first, tl.int32), mask=tile < last)
        tl.store(record + 2, tl.full((BLOCK,), own, tl.int32), mask=tile < last)
        tl.store(record + 3, tl.full((BLOCK,), start, tl.int32), mask=tile < last)
        tl.store(record + 4, tl.full((BLOCK,), end, tl.int32), mask=tile < last)


@triton.jit
def count_tiles(
    offsets_ptr, tiles_ptr, E, OUT_TILES,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Number of tiles that have work."""
    if EXPERTS == 0:
        return tl.load(tiles_ptr) * OUT_TILES
    else:
        experts = tl.arange(0, EXPERTS)
        starts = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
        ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
        return tl.sum((ends - starts + ROWS - 1).to(tl.int32) // ROWS) * OUT_TILES


@triton.jit
def find_tile(
    tile, offsets_ptr, tiles_ptr, E, OUT_TILES,
    ROWS: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The expert, first row, end of the expert's rows and output tile of a tile; expert E: a spare one.

    With EXPERTS (a power of two, at least e) it is searched in the offsets, else read from the map.
    """
    row_tile = tile // OUT_TILES
    if EXPERTS == 0:
        record = tiles_ptr + (1 + row_tile) * RECORD
        expert, first, tiles = tl.load(record), tl.load(record + 1), tl.load(record + 2)
        start, end = tl.load(record + 3), tl.load(record + 4)
    else:
        experts = tl.arange(0, EXPERTS)
        starts = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
        ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
        of_expert = (ends - starts + ROWS - 1).to(tl.int32) // ROWS
        expert = tl.minimum(tl.sum((tl.cumsum(of_expert, 0) <= row_tile).to(tl.int32)), E)
        first = tl.sum(tl.where(experts < expert, of_expert, 0))
        tiles = tl.sum(tl.where(experts == expert, of_expert, 0))
        start = tl.load(offsets_ptr + expert).to(tl.int32)
        end = tl.load(offsets_ptr + tl.minimum(expert + 1, E)).to(tl.int32)
    within = tile - first * OUT_TILES
    group = within // (GROUP * OUT_TILES)
    height = max(min(tiles - group * GROUP, GROUP), 1)
    within = within - group * GROUP * OUT_TILES
    return expert, start + (group * GROUP + within % height) * ROWS, end, within // height


@triton.jit
def load_weight(
    weight, expert, out_start, in_start, OUT_COUNT, IN_COUNT, stride_e, stride_o, stride_i,
    OUTS: tl.constexpr, INS: tl.constexpr, TMA: tl.constexpr, IN_FIRST: tl.constexpr,
    EVEN_IN: tl.constexpr, EVEN_OUT: tl.constexpr,
):  # fmt: skip
    """Tile (OUTS INS) of the weight (e o i) of one expert, 0 beyond its edges.

    weight: a descriptor whose last axis is the contiguous one (IN_FIRST: it is o), or a pointer. EVEN_IN,
    EVEN_OUT: no tile crosses that edge.
    """
    if TMA:
        if IN_FIRST:
            return weight.load([expert, in_start, out_start]).reshape(INS, OUTS).T
        else:
            return weight.load([expert, out_start, in_start]).reshape(OUTS, INS)
    else:
        outs = out_start + tl.arange(0, OUTS).to(tl.int64)
        ins = tl.arange(0, INS).to(tl.int64)
        tile = weight + expert.to(tl.int64) * stride_e + tl.cast(in_start, tl.int64) * stride_i
        tile += outs[:, None] * stride_o + ins[None, :] * stride_i
        if EVEN_IN and EVEN_OUT:
            return tl.load(tile)
        elif EVEN_IN:
            return tl.load(tile, mask=(outs < OUT_COUNT)[:, None], other=0.0)
        else:
            return tl.load(
                tile, mask=(outs < OUT_COUNT)[:, None] & (in_start + ins < IN_COUNT)[None, :], other=0.0
            )


@triton.jit
def load_columns(rows, columns, COUNT, EVEN: tl.constexpr):
    """Tile of some columns of rows given as pointers (ROWS 1); 0 beyond the last column unless EVEN."""
    if EVEN:
        return tl.load(rows + columns[None, :])
    else:
        return tl.load(rows + columns[None, :], mask=(columns < COUNT)[None, :], other=0.0)


@triton.jit
def product(rows, weight, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + rows (ROWS INS) @ weight (OUTS INS)^T; with SWAP acc is (OUTS ROWS)."""
    if SWAP:
        return dot(weight, rows.T, acc, PRECISION)
    else:
        return dot(rows, weight.T, acc, PRECISION)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. PRECISION is for float32 operands: "ieee" or "tf32"."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def zeros(ROWS: tl.constexpr, OUTS: tl.constexpr, SWAP: tl.constexpr):
    """An empty accumulator."""
    if SWAP:
        return tl.zeros((OUTS, ROWS), tl.float32)
    else:
        return tl.zeros((ROWS, OUTS), tl.float32)


@triton.jit
def unswap(acc, SWAP: tl.constexpr):
    """The accumulator as (ROWS OUTS)."""
    if SWAP:
        return acc.T
    else:
        return acc


@triton.jit
def quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's columns in four pieces, without leaving the registers.

    What follows a product is done a piece at a time: for a whole tile it would need several times the
    registers of the accumulator.
    """
    left, right = halves(tile, ROWS, COLUMNS)
    a, b = halves(left, ROWS, COLUMNS // 2)
    c, d = halves(right, ROWS, COLUMNS // 2)
    return a, b, c, d


@triton.jit
def eighths(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's columns in eight pieces, without leaving the registers."""
    left, right = halves(tile, ROWS, COLUMNS)
    a, b, c, d = quarters(left, ROWS, COLUMNS // 2)
    e, f, g, h = quarters(right, ROWS, COLUMNS // 2)
    return a, b, c, d, e, f, g, h


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's columns in two pieces, without leaving the registers."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The tensors of a routing plan, and the tile maps made from it so far, by tile height."""

    pair_of_row: Tensor
    row_of_pair: Tensor
    offsets: Tensor
    top_k: int
    maps: dict[int, Tensor]

    @property
    def num_experts(self) -> int:
        """Number of experts e."""
        return self.offsets.shape[0] - 1

    @property
    def pairs(self) -> int:
        """Number of pairs p."""
        return self.pair_of_row.shape[0]

    def tile_bound(self, rows: int) -> int:
        """The most tiles of so many rows that p rows of e experts can make, whatever the routing."""
        busy = min(self.num_experts, self.pairs)
        return busy + (self.pairs - busy) // rows

    def tile_arguments(self, config: Config) -> Mapping[str, Any]:
        """What a kernel needs to find its tile."""
        searched = self.pairs <= SEARCHED_PAIRS and self.num_experts <= SEARCHED_PAIRS
        return {
            "offsets_ptr": self.offsets,
            "tiles_ptr": self.offsets if searched else self._map(config.rows),
            "E": self.num_experts,
            "EXPERTS": power_of_2(self.num_experts) if searched else 0,
        }

    def _map(self, rows: int) -> Tensor:
        if rows not in self.maps:
            self.maps[rows] = make_tile_map(self.offsets, self.tile_bound(rows), rows)
        return self.maps[rows]


def make_tile_map(offsets: Tensor, bound: int, rows: int) -> Tensor:
    """The records (1 + bound, RECORD) of tiles of so many rows, as `tile_map_kernel` says."""
    num_experts = offsets.shape[0] - 1
    tiles = offsets.new_empty(1 + bound, RECORD.value, dtype=torch.int32)
    arguments = {
        "offsets_ptr": offsets,
        "tiles_ptr": tiles,
        "E": num_experts,
        "BOUND": bound,
        "ROWS": rows,
        "EXPERTS": power_of_2(num_experts),
        "BLOCK": 128,
    }
    launch(tile_map_kernel, (num_experts + 1,), arguments)
    return tiles


def weight_arguments(weight: Tensor, config: Config, *, width: int = 1) -> Mapping[str, Any]:
    """weight (e o i) in any strides for `load_weight`: by a descriptor where config and memory allow it.

    width: tiles are width * config.outs outputs wide.
    """
    in_first = weight.stride(1) == 1 and weight.stride(2) != 1
    view = weight.mT if in_first else weight
    tile = (config.outs * width, config.ins)
    box = [1, *(tile[::-1] if in_first else tile)]
    tma = config.tma and has_descriptors(weight.device) and can_describe(view)
    return {
        "w": TensorDescriptor(view, list(view.shape), list(view.stride()), box) if tma else weight,
        "TMA": tma,
        "IN_FIRST": in_first,
        **weight_strides(weight),
    }


def weight_strides(weight: Tensor) -> Mapping[str, int]:
    """The strides of a weight (e o i), by the names of the kernels."""
    return dict(zip(("w_stride_e", "w_stride_o", "w_stride_i"), weight.stride(), strict=True))


def has_descriptors(device: torch.device) -> bool:
    """Whether the tensor memory accelerator is there; the interpreter has it too."""
    target = target_of(device)
    return INTERPRETED or (target.kind == "cuda" and int(target.arch) >= 90)


def can_describe(tensor: Tensor) -> bool:
    """Whether the accelerator can address it: last stride 1, others and the start on 16 bytes, not empty."""
    item = tensor.element_size()
    return (
        tensor.stride(-1) == 1
        and all(s > 0 and s * item % 16 == 0 for s in tensor.stride()[:-1])
        and tensor.data_ptr() % 16 == 0
        and tensor.numel() > 0
        and tensor.shape[-1] * item >= 16
    )


def precision() -> str:
    """How float32 operands are multiplied: exactly, or as tf32 when torch's own products are."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def programs(config: Config, tiles: int, device: torch.device) -> int:
    """Programs of a launch: one a tile, or at most so many as run at once."""
    if not config.persistent:
        return tiles
    return min(tiles, target_of(device).units * config.programs)
