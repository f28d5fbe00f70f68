"""Rows moved and summed: everything that is bound by memory.

Sums are in float32 and in a fixed order; rows from offsets[e] on, which belong to dropped pairs, are read by
nobody. Columns lie in a row: the last stride of every matrix is 1.
"""

# In kernel bodies types are Triton's.
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, launch, power_of_2

MOST_COLUMNS = 1024  # of a program: with 4 warps 8 numbers a thread
MOST_LOADS = 64  # written out one after the other: 128 spill 7 kB a thread, and compile for a quarter minute


@triton.jit
def gather_kernel(
    x_ptr, weights_ptr, pair_of_row_ptr, out_ptr, D, x_stride,
    TOP_K: tl.constexpr, SCALE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[r] = x[token of r], times the weight of the pair with SCALE."""
    row = tl.program_id(0)
    pair = tl.load(pair_of_row_ptr + row).to(tl.int32)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(x_ptr + (pair // TOP_K).to(tl.int64) * x_stride + columns, mask=columns < D, other=0.0)
    if SCALE:
        values = values.to(tl.float32) * tl.load(weights_ptr + pair).to(tl.float32)
    to = out_ptr + row.to(tl.int64) * D + columns
    tl.store(to, values.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["P"])
def sum_kernel(
    rows_ptr, weights_ptr, row_of_pair_ptr, kept_ptr, out_ptr, D, P,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, UNROLLED: tl.constexpr, SCALE: tl.constexpr,
    ALL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over its choices, in slot order, of their rows, each the sum of SPLITS parts (p d).

    The loads of UNROLLED choices are on their way at once.
    """
    token = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = P if ALL else tl.load(kept_ptr).to(tl.int32)
    acc = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, TOP_K, UNROLLED):
        for i in tl.static_range(UNROLLED):
            choice = first + i
            is_choice = choice < TOP_K
            pair = token.to(tl.int64) * TOP_K + choice
            row = tl.load(row_of_pair_ptr + pair, mask=is_choice, other=P).to(tl.int32)
            is_kept = columns < tl.where(is_choice & (row < kept), D, 0)
            total = tl.zeros((COLUMNS,), tl.float32)
            for split in tl.static_range(SPLITS):
                at = rows_ptr + (row.to(tl.int64) + tl.cast(split, tl.int64) * P) * D + columns
                total += tl.load(at, mask=is_kept, other=0.0).to(tl.float32)
            if SCALE:
                weight = tl.load(weights_ptr + pair, mask=is_choice, other=0.0).to(tl.float32)
                total = tl.where(is_kept, total * weight, 0.0)
            acc += total
    tl.store(out_ptr + token.to(tl.int64) * D + columns, acc.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def combine_grads_kernel(
    grad_ptr, rows_ptr, weights_ptr, pair_of_row_ptr, kept_ptr, grad_rows_ptr, grad_weights_ptr, D,
    grad_stride, rows_stride, TOP_K: tl.constexpr, WRITE_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_weights[pair of r] = <rows[r], grad[token]>; with WRITE_ROWS grad_rows[r] = weight grad[token]."""
    row = tl.program_id(0)
    kept_columns = tl.where(row < tl.load(kept_ptr), D, 0)
    pair = tl.load(pair_of_row_ptr + row).to(tl.int32)
    grad_row = grad_ptr + (pair // TOP_K).to(tl.int64) * grad_stride
    own_row = rows_ptr + row.to(tl.int64) * rows_stride
    weight = tl.load(weights_ptr + pair).to(tl.float32)
    dots = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = columns < kept_columns
        grad = tl.load(grad_row + columns, mask=mask, other=0.0).to(tl.float32)
        dots += grad * tl.load(own_row + columns, mask=mask, other=0.0).to(tl.float32)
        if WRITE_ROWS:
            to = grad_rows_ptr + row.to(tl.int64) * D + columns
            scaled = tl.where(mask, grad * weight, 0.0)
            tl.store(to, scaled.to(grad_rows_ptr.dtype.element_ty), mask=columns < D)
    tl.store(grad_weights_ptr + pair, tl.sum(dots).to(grad_weights_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["P"])
def weight_grads_kernel(
    parts_ptr, pair_of_row_ptr, offsets_ptr, grad_ptr, bias_ptr, out_ptr, P, E, D, grad_stride,
    bias_stride_e, bias_stride_d, TOP_K: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[pair of r] = sum of the parts (n p) of row r, and <grad[token], bias[expert]>; 0 if dropped."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < P
    is_kept = is_row & (rows < tl.load(offsets_ptr + E))
    pairs = tl.load(pair_of_row_ptr + rows, mask=is_row, other=0).to(tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * P + rows, mask=is_kept, other=0.0)
    if HAS_BIAS:
        numbers = tl.arange(0, EXPERTS)
        ends = tl.load(offsets_ptr + numbers + 1, mask=numbers < E, other=P)
        is_earlier = (ends[None, :] <= rows[:, None]) & (numbers < E)[None, :]
        experts = tl.minimum(tl.sum(is_earlier.to(tl.int32), 1), E - 1)
        grad_rows = grad_ptr + (pairs // TOP_K).to(tl.int64)[:, None] * grad_stride
        bias_rows = bias_ptr + experts.to(tl.int64)[:, None] * bias_stride_e
        dots = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, D, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            mask = is_kept[:, None] & (columns < D)[None, :]
            grad = tl.load(grad_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            dots += grad * tl.load(bias_rows + columns[None, :] * bias_stride_d, mask=mask, other=0.0).to(
                tl.float32
            )
        total += tl.sum(dots, 1)
    tl.store(out_ptr + pairs, total.to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def expert_sums_kernel(
    rows_ptr, weights_ptr, pair_of_row_ptr, offsets_ptr, out_ptr, N, rows_stride,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the rows of expert e, given by row or, with GATHER, by token."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(offsets_ptr + expert).to(tl.int32), tl.load(offsets_ptr + expert + 1).to(tl.int32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        pairs = (
            tl.load(pair_of_row_ptr + rows, mask=rows < end, other=0).to(tl.int32)
            if GATHER or SCALE
            else rows
        )
        at = (pairs // TOP_K if GATHER else rows).to(tl.int64)[:, None] * rows_stride + columns[None, :]
        values = tl.load(rows_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if SCALE:
            values *= tl.load(weights_ptr + pairs, mask=rows < end, other=0.0).to(tl.float32)[:, None]
        acc += values
    to = out_ptr + expert.to(tl.int64) * N + columns
    tl.store(to, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=columns < N)


@triton.jit(do_not_specialize=["P"])
def zero_rest_kernel(rows_ptr, kept_ptr, P, N, COLUMNS: tl.constexpr):
    """Rows from the last kept one on become 0; a program takes every so many of them."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    zero = tl.zeros((COLUMNS,), rows_ptr.dtype.element_ty)
    for row in range(tl.load(kept_ptr).to(tl.int32) + tl.program_id(0), P, tl.num_programs(0)):
        tl.store(rows_ptr + tl.cast(row, tl.int64) * N + columns, zero, mask=columns < N)


def gather_rows(x: Tensor, pair_of_row: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    """x (t d) -> (p d): each row its token, times its weight (t k) if given."""
    out = x.new_empty(pair_of_row.shape[0], x.shape[1])
    arguments = {
        "x_ptr": x,
        "weights_ptr": x if weights is None else weights,
        "pair_of_row_ptr": pair_of_row,
        "out_ptr": out,
        "D": x.shape[1],
        "x_stride": x.stride(0),
        "TOP_K": top_k,
        "SCALE": weights is not None,
    }
    _launch_columns(gather_kernel, out.shape[0], out.shape[1], arguments)
    return out


def sum_rows(
    rows: Tensor,
    row_of_pair: Tensor,
    offsets: Tensor | None,
    top_k: int,
    weights: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """rows (p d), contiguous, or parts (s p d) -> (t d): a token is the sum of its rows, in slot order.

    weights (t k) multiply the rows. Rows from offsets[e] on are left out; without offsets all count.
    """
    splits = rows.shape[0] if rows.dim() == 3 else 1
    pairs, d = row_of_pair.shape[0], rows.shape[-1]
    tokens = pairs // top_k if top_k else 0
    out = rows.new_empty(tokens, d, dtype=dtype or rows.dtype)
    arguments = {
        "rows_ptr": rows,
        "weights_ptr": rows if weights is None else weights,
        "row_of_pair_ptr": row_of_pair,
        "kept_ptr": row_of_pair if offsets is None else offsets[-1:],
        "out_ptr": out,
        "D": d,
        "P": pairs,
        "TOP_K": top_k,
        "SPLITS": splits,
        "UNROLLED": max(1, min(top_k, MOST_LOADS // splits)),
        "SCALE": weights is not None,
        "ALL": offsets is None,
    }
    _launch_columns(sum_kernel, tokens, d, arguments)
    return out


def combine_grads(
    grad: Tensor, rows: Tensor, weights: Tensor, pair_of_row: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows (p d) and weights (t k), given that of the sum (t d); 0 for dropped pairs."""
    grad_rows = rows.new_empty(rows.shape)
    return grad_rows, _dots(grad, rows, weights, pair_of_row, offsets, grad_rows)


def row_dots(rows: Tensor, x: Tensor, pair_of_row: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """<rows[r], x[token of r]> for each pair, in shape and dtype of weights (t k); 0 for dropped pairs."""
    return _dots(x, rows, weights.contiguous(), pair_of_row, offsets, None)


def _dots(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    offsets: Tensor,
    grad_rows: Tensor | None,
) -> Tensor:
    out, d = weights.new_empty(weights.shape), rows.shape[1]
    arguments = {
        "grad_ptr": grad,
        "rows_ptr": rows,
        "weights_ptr": weights,
        "pair_of_row_ptr": pair_of_row,
        "kept_ptr": offsets[-1:],
        "grad_rows_ptr": rows if grad_rows is None else grad_rows,
        "grad_weights_ptr": out,
        "D": d,
        "grad_stride": grad.stride(0),
        "rows_stride": rows.stride(0),
        "TOP_K": weights.shape[1],
        "WRITE_ROWS": grad_rows is not None,
        "COLUMNS": _columns(d),
    }
    launch(combine_grads_kernel, (rows.shape[0],), arguments)
    return out


def weight_grads(
    parts: Tensor,
    pair_of_row: Tensor,
    offsets: Tensor,
    weights: Tensor,
    grad: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    """Sum of the parts (n p) of rows, and <grad[token], down_bias[expert]>, in the shape of weights (t k)."""
    pairs, num_experts = pair_of_row.shape[0], offsets.shape[0] - 1
    out = weights.new_empty(weights.shape)
    rows = 128 if down_bias is None else 16
    arguments = {
        "parts_ptr": parts,
        "pair_of_row_ptr": pair_of_row,
        "offsets_ptr": offsets,
        "grad_ptr": grad,
        "bias_ptr": grad if down_bias is None else down_bias,
        "out_ptr": out,
        "P": pairs,
        "E": num_experts,
        "D": grad.shape[1],
        "grad_stride": grad.stride(0),
        "bias_stride_e": 0 if down_bias is None else down_bias.stride(0),
        "bias_stride_d": 0 if down_bias is None else down_bias.stride(1),
        "TOP_K": weights.shape[1],
        "PARTS": parts.shape[0],
        "HAS_BIAS": down_bias is not None,
        "EXPERTS": power_of_2(num_experts),
        "ROWS": rows,
        "COLUMNS": 128,
    }
    launch(weight_grads_kernel, (ceil_div(pairs, rows),), arguments)
    return out


def expert_sums(
    rows: Tensor,
    offsets: Tensor,
    pair_of_row: Tensor | None,
    top_k: int,
    weights: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Sum over each expert's rows -> (e n), from rows (p n) or, with pair_of_row, from tokens (t n).

    weights (t k) multiply the rows, and need pair_of_row. An expert without rows gets 0.
    """
    num_experts, width, columns = offsets.shape[0] - 1, rows.shape[1], 64
    out = rows.new_empty(num_experts, width, dtype=dtype)
    arguments = {
        "rows_ptr": rows,
        "weights_ptr": rows if weights is None else weights,
        "pair_of_row_ptr": offsets if pair_of_row is None else pair_of_row,
        "offsets_ptr": offsets,
        "out_ptr": out,
        "N": width,
        "rows_stride": rows.stride(0),
        "TOP_K": top_k,
        "GATHER": pair_of_row is not None,
        "SCALE": weights is not None,
        "ROWS": 32,
        "COLUMNS": columns,
    }
    launch(expert_sums_kernel, (num_experts, ceil_div(width, columns)), arguments)
    return out


def zero_rest(rows: Tensor, offsets: Tensor) -> None:
    """Write 0 into rows (p n), contiguous, from offsets[e] on."""
    pairs, width = rows.shape
    arguments = {"rows_ptr": rows, "kept_ptr": offsets[-1:], "P": pairs, "N": width}
    _launch_columns(zero_rest_kernel, min(pairs, 64), width, arguments)


def _launch_columns(kernel: Any, programs: int, width: int, arguments: dict[str, Any]) -> None:
    """One program for each row, or token, and block of columns."""
    columns = _columns(width)
    launch(kernel, (programs, ceil_div(width, columns)), {**arguments, "COLUMNS": columns})


def _columns(width: int) -> int:
    return min(MOST_COLUMNS, max(16, power_of_2(width)))
