"""Rows times the weight of the expert that owns them: down-projection, gradient of rows, and level 1.

y[r] = W[e] rows[r] + b[e] for the rows r of expert e; rows (p i), W (e o i) in any strides, y (p o).
"""

# In kernel bodies types are Triton's.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Config
from .launch import ceil_div, launch
from .tiles import (
    Plan,
    can_describe,
    count_tiles,
    find_tile,
    has_descriptors,
    load_columns,
    load_weight,
    precision,
    product,
    programs,
    unswap,
    weight_arguments,
    zeros,
)


@triton.jit
def linear_tile(
    rows_ptr, rows_tma, w, bias_ptr, y_ptr, expert, row, end, out_tile, P, I, O,
    rows_stride, w_stride_e, w_stride_o, w_stride_i, bias_stride_e, bias_stride_o,
    SPLIT_INS, HAS_BIAS: tl.constexpr, ROWS_TMA: tl.constexpr, TMA: tl.constexpr, IN_FIRST: tl.constexpr,
    EVEN_IN: tl.constexpr, EVEN_OUT: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """One tile (ROWS OUTS) of y."""
    split = tl.program_id(1)
    numbers = row + tl.arange(0, ROWS)
    own_rows = rows_ptr + tl.minimum(numbers, end - 1).to(tl.int64)[:, None] * rows_stride
    acc = zeros(ROWS, OUTS, SWAP)
    first_in = split * SPLIT_INS
    for start in range(first_in, min(first_in + SPLIT_INS, I), INS):
        if ROWS_TMA:
            x = rows_tma.load([row, start])
        else:
            x = load_columns(own_rows, start + tl.arange(0, INS), I, EVEN_IN)
        tile_w = load_weight(
            w, expert, out_tile * OUTS, start, O, I, w_stride_e, w_stride_o, w_stride_i,
            OUTS, INS, TMA, IN_FIRST, EVEN_IN, EVEN_OUT,
        )  # fmt: skip
        acc = product(x, tile_w, acc, SWAP, PRECISION)
    acc = unswap(acc, SWAP)
    outs = out_tile * OUTS + tl.arange(0, OUTS)
    if HAS_BIAS:
        bias = bias_ptr + expert.to(tl.int64) * bias_stride_e + outs * bias_stride_o
        acc += tl.load(bias, mask=outs < tl.where(split == 0, O, 0), other=0.0).to(tl.float32)[None, :]
    y = y_ptr + (split * P + numbers).to(tl.int64)[:, None] * O + outs[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(numbers < end)[:, None] & (outs < O)[None, :])


@triton.jit(do_not_specialize=["P"])
def linear_kernel(
    rows_ptr, rows_tma, w, bias_ptr, y_ptr, offsets_ptr, tiles_ptr, E, P, I, O,
    OUT_TILES, rows_stride, w_stride_e, w_stride_o, w_stride_i, bias_stride_e, bias_stride_o,
    SPLIT_INS, HAS_BIAS: tl.constexpr, ROWS_TMA: tl.constexpr, TMA: tl.constexpr, IN_FIRST: tl.constexpr,
    EVEN_IN: tl.constexpr, EVEN_OUT: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, GROUP: tl.constexpr,
    EXPERTS: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Program (., s) sums the inputs from s * SPLIT_INS on, SPLIT_INS of them, into y[s] (p o)."""
    if PERSISTENT:
        total = count_tiles(offsets_ptr, tiles_ptr, E, OUT_TILES, ROWS, EXPERTS)
        # What is hoisted out of the loop over tiles would hold registers through the inner one.
        for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=True, disable_licm=True):
            expert, row, end, out_tile = find_tile(
                tile, offsets_ptr, tiles_ptr, E, OUT_TILES, ROWS, GROUP, EXPERTS
            )
            linear_tile(
                rows_ptr, rows_tma, w, bias_ptr, y_ptr, expert, row, end, out_tile, P, I, O,
                rows_stride, w_stride_e, w_stride_o, w_stride_i, bias_stride_e, bias_stride_o,
                SPLIT_INS, HAS_BIAS, ROWS_TMA, TMA, IN_FIRST, EVEN_IN, EVEN_OUT, SWAP, PRECISION,
                ROWS, OUTS, INS,
            )  # fmt: skip
    else:
        expert, row, end, out_tile = find_tile(
            tl.program_id(0), offsets_ptr, tiles_ptr, E, OUT_TILES, ROWS, GROUP, EXPERTS
        )
        if expert < E:
            linear_tile(
                rows_ptr, rows_tma, w, bias_ptr, y_ptr, expert, row, end, out_tile, P, I, O,
                rows_stride, w_stride_e, w_stride_o, w_stride_i, bias_stride_e, bias_stride_o,
                SPLIT_INS, HAS_BIAS, ROWS_TMA, TMA, IN_FIRST, EVEN_IN, EVEN_OUT, SWAP, PRECISION,
                ROWS, OUTS, INS,
            )  # fmt: skip


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, config: Config) -> Tensor:
    """y (p o), or its float32 parts (s p o) when the config has splits; rows (p i) have a last stride of 1.

    Rows from offsets[e] on are left as the memory was.
    """
    p, inputs = rows.shape
    outputs = weight.shape[1]
    splits = config.splits
    y = rows.new_empty(p, outputs) if splits == 1 else rows.new_empty(splits, p, outputs, dtype=torch.float32)
    rows_tma = config.tma and has_descriptors(rows.device) and can_describe(rows)
    out_tiles = ceil_div(outputs, config.outs)
    arguments = {
        "rows_ptr": rows,
        "rows_tma": TensorDescriptor(rows, [p, inputs], [rows.stride(0), 1], [config.rows, config.ins])
        if rows_tma
        else rows,
        "bias_ptr": rows if bias is None else bias,
        "y_ptr": y,
        "P": p,
        "I": inputs,
        "O": outputs,
        "OUT_TILES": out_tiles,
        "rows_stride": rows.stride(0),
        "bias_stride_e": 0 if bias is None else bias.stride(0),
        "bias_stride_o": 0 if bias is None else bias.stride(1),
        "SPLIT_INS": ceil_div(ceil_div(inputs, config.ins), splits) * config.ins,
        "HAS_BIAS": bias is not None,
        "ROWS_TMA": rows_tma,
        "EVEN_IN": inputs % config.ins == 0,
        "EVEN_OUT": outputs % config.outs == 0,
        "SWAP": config.swap,
        "PRECISION": precision(),
        "ROWS": config.rows,
        "OUTS": config.outs,
        "INS": config.ins,
        "GROUP": config.group,
        "PERSISTENT": config.persistent,
        **weight_arguments(weight, config),
        **plan.tile_arguments(config),
    }
    tiles = plan.tile_bound(config.rows) * out_tiles
    launch(linear_kernel, (programs(config, tiles, rows.device), splits), arguments, **config.options)
    return y
