"""Gradient of the experts' weights: for each expert, a product over its rows.

dW[e] = sum over the rows r of expert e of a[r] b[r]^T; a (p o), b (p i), dW (e o i). Either may be given by
token instead of by row and is then gathered on the way. One program owns a tile of dW and walks over all rows
of its expert in order, so the sum has one order and no atomics; an expert without rows writes zeros.
"""

# In kernel bodies types are Triton's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Config
from .launch import ceil_div, launch
from .tiles import Plan, can_describe, dot, has_descriptors, precision, quarters


@triton.jit
def load_rows(
    ptr, tma, pair_of_row_ptr, row, end, column, stride, COUNT,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, TMA: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tile (ROWS COLUMNS) of an operand; 0 beyond `end`, unless FULL, and beyond the last column."""
    if TMA and FULL:
        return tma.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        if GATHER:
            pairs = tl.load(pair_of_row_ptr + (rows if FULL else tl.minimum(rows, end - 1)))
            rows = pairs.to(tl.int32) // TOP_K
        at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        if FULL and EVEN:
            return tl.load(at)
        elif FULL:
            return tl.load(at, mask=(columns < COUNT)[None, :], other=0.0)
        else:
            is_own = (row + tl.arange(0, ROWS) < end)[:, None]
            return tl.load(at, mask=is_own & (columns < COUNT)[None, :], other=0.0)


@triton.jit
def grad_weight_kernel(
    a_ptr, a_tma, b_ptr, b_tma, out_ptr, out_tma, pair_of_row_ptr, offsets_ptr, O, I, OUT_TILES, IN_TILES,
    a_stride, b_stride, out_stride_e, out_stride_o, out_stride_i,
    TOP_K: tl.constexpr, GATHER: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, OUT_TMA: tl.constexpr, SWAP: tl.constexpr,
    EVEN_O: tl.constexpr, EVEN_I: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles run over the experts in order; inside an expert GROUP output tiles run side by side.

    GATHER: a is given by token. SWAP: dW lies as (e i o), the transpose of what the tiles are.
    """
    tiles = OUT_TILES * IN_TILES
    expert, within = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    group = within // (GROUP * IN_TILES)
    height = min(OUT_TILES - group * GROUP, GROUP)
    within = within - group * GROUP * IN_TILES
    out, column = (group * GROUP + within % height) * OUTS, (within // height) * INS
    start = tl.load(offsets_ptr + expert).to(tl.int32)
    end = tl.load(offsets_ptr + expert + 1).to(tl.int32)
    full = start + (end - start) // ROWS * ROWS
    acc = tl.zeros((OUTS, INS), tl.float32)
    for row in range(start, full, ROWS):
        a = load_rows(
            a_ptr, a_tma, pair_of_row_ptr, row, end, out, a_stride, O,
            TOP_K, GATHER, A_TMA, True, EVEN_O, ROWS, OUTS,
        )  # fmt: skip
        b = load_rows(
            b_ptr, b_tma, pair_of_row_ptr, row, end, column, b_stride, I,
            TOP_K, False, B_TMA, True, EVEN_I, ROWS, INS,
        )  # fmt: skip
        acc = dot(a.T, b, acc, PRECISION)
    if full < end:
        a = load_rows(
            a_ptr, a_tma, pair_of_row_ptr, full, end, out, a_stride, O,
            TOP_K, GATHER, A_TMA, False, EVEN_O, ROWS, OUTS,
        )  # fmt: skip
        b = load_rows(
            b_ptr, b_tma, pair_of_row_ptr, full, end, column, b_stride, I,
            TOP_K, False, B_TMA, False, EVEN_I, ROWS, INS,
        )  # fmt: skip
        acc = dot(a.T, b, acc, PRECISION)
    if OUT_TMA:
        result = acc.to(out_ptr.dtype.element_ty)
        if SWAP:
            out_tma.store([expert, column, out], result.T.reshape(1, INS, OUTS))
        else:
            out_tma.store([expert, out, column], result.reshape(1, OUTS, INS))
    else:
        outs = out + tl.arange(0, OUTS).to(tl.int64)
        rows_of_out = out_ptr + expert.to(tl.int64) * out_stride_e + outs[:, None] * out_stride_o
        pieces = quarters(acc, OUTS, INS)
        for i in tl.static_range(4):
            ins = column + i * (INS // 4) + tl.arange(0, INS // 4).to(tl.int64)
            to = rows_of_out + ins[None, :] * out_stride_i
            is_inside = (outs < O)[:, None] & (ins < I)[None, :]
            piece = pieces[i]
            if ACCUMULATE:
                piece += tl.load(to, mask=is_inside, other=0.0).to(tl.float32)
            tl.store(to, piece.to(out_ptr.dtype.element_ty), mask=is_inside)


def grad_weight(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    plan: Plan,
    config: Config,
    *,
    gather_a: bool = False,
    gather_b: bool = False,
    accumulate: bool = False,
) -> None:
    """Write dW (e o i) into out, in any strides and dtype, or add to it with `accumulate`.

    a (p o) or, gathered, (t o); b (p i) or, gathered, (t i); last strides of 1.
    """
    is_transposed = out.stride(1) == 1 and out.stride(2) != 1
    # What is gathered is the left operand, the narrow one: its pieces take longer to come than a wide tile
    # by the accelerator. Elsewhere the tile's last axis is the one that lies in a row.
    flips = gather_b or (is_transposed and not gather_a)
    swap, lies = flips != is_transposed, out.mT if is_transposed else out
    out_tma, tiles = _tiles_of(lies, config, swap=swap, accumulate=accumulate)
    if flips:
        a, b, out = b, a, out.mT
    gathers = gather_a or gather_b
    num_experts, outputs, inputs = out.shape
    out_tiles, in_tiles = ceil_div(outputs, config.outs), ceil_div(inputs, config.ins)
    a_tma, a_operand = (False, a) if gathers else _operand(a, config.outs, config)
    b_tma, b_operand = _operand(b, config.ins, config)
    arguments = {
        "a_ptr": a,
        "a_tma": a_operand,
        "b_ptr": b,
        "b_tma": b_operand,
        "out_ptr": out,
        "out_tma": tiles,
        "pair_of_row_ptr": plan.pair_of_row,
        "offsets_ptr": plan.offsets,
        "O": outputs,
        "I": inputs,
        "OUT_TILES": out_tiles,
        "IN_TILES": in_tiles,
        "a_stride": a.stride(0),
        "b_stride": b.stride(0),
        "out_stride_e": out.stride(0),
        "out_stride_o": out.stride(1),
        "out_stride_i": out.stride(2),
        "TOP_K": plan.top_k,
        "GATHER": gathers,
        "A_TMA": a_tma,
        "B_TMA": b_tma,
        "OUT_TMA": out_tma,
        "SWAP": swap,
        "EVEN_O": outputs % config.outs == 0,
        "EVEN_I": inputs % config.ins == 0,
        "ACCUMULATE": accumulate,
        "PRECISION": precision(),
        "ROWS": config.rows,
        "OUTS": config.outs,
        "INS": config.ins,
        "GROUP": config.group,
    }
    # Two of the stages go to the index of what is gathered; without them the operands' tiles would fill them.
    stages = config.num_stages if gathers else max(2, config.num_stages - 2)
    grid = (num_experts * out_tiles * in_tiles,)
    launch(grad_weight_kernel, grid, arguments, **config.options | {"num_stages": stages})


def _operand(rows: Tensor, width: int, config: Config):
    """Whether whole tiles of an operand come by the tensor memory accelerator, and its descriptor if so."""
    if not (config.tma and has_descriptors(rows.device) and can_describe(rows)):
        return False, rows
    return True, TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [config.rows, width])


def _tiles_of(out: Tensor, config: Config, *, swap: bool, accumulate: bool):
    """Whether tiles of dW leave by the accelerator, and a descriptor of it as it lies in memory if so."""
    if accumulate or not (config.tma and has_descriptors(out.device) and can_describe(out)):
        return False, out
    box = [1, config.ins, config.outs] if swap else [1, config.outs, config.ins]
    return True, TensorDescriptor(out, list(out.shape), list(out.stride()), box)
