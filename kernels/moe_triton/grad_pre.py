"""Backward through down-projection and activation in one kernel: pass 1 of the backward.

With P = W_down[e]^T dy[token of r] (p h), s the routing weight of the row, hidden = act(pre) computed again:
    gradient of hidden = s P,   gradient of pre = act'(pre) * (s P),
    scaled hidden = s hidden (what the gradient of W_down needs),   gradient of s = <P, hidden>.
The expert's outputs are never needed: <dy, W_down hidden> = <P, hidden> (SonicMoE, 2512.14080).
"""

# In kernel bodies types are Triton's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activation_grads
from .config import choose_config
from .launch import ceil_div, launch, target_of
from .settings import Settings
from .tiles import (
    Plan,
    eighths,
    find_tile,
    load_columns,
    load_weight,
    precision,
    product,
    quarters,
    unswap,
    weight_arguments,
    zeros,
)


@triton.jit
def finish_columns(
    acc, scale, row_start, has_row, out, pre_ptr, grad_pre_ptr, hidden_ptr, H, limit, alpha,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From P (ROWS COLUMNS), columns from `out` on: writes grad_pre and hidden; <P, hidden> of each row."""
    outs = out + tl.arange(0, COLUMNS)
    is_own = has_row & (outs < H)[None, :]
    element = pre_ptr.dtype.element_ty
    if GATE == "pairs":
        wide = 2 * out + tl.arange(0, 2 * COLUMNS)
        at = row_start * 2 * H + wide[None, :]
        is_wide = has_row & (wide < 2 * H)[None, :]
        both = tl.load(pre_ptr + at, mask=is_wide, other=0.0).to(tl.float32)
        gate, up = both.reshape(ROWS, COLUMNS, 2).split()
    elif GATE == "halves":
        at = row_start * 2 * H + outs[None, :]
        gate = tl.load(pre_ptr + at, mask=is_own, other=0.0).to(tl.float32)
        up = tl.load(pre_ptr + at + H, mask=is_own, other=0.0).to(tl.float32)
    else:
        at = row_start * H + outs[None, :]
        gate = tl.load(pre_ptr + at, mask=is_own, other=0.0).to(tl.float32)
        up = gate
    hidden, grad_gate, grad_up = activation_grads(
        gate, up, acc * scale if SCALE else acc, limit, alpha, ACTIVATION
    )
    if GATE == "pairs":
        both = tl.join(grad_gate, grad_up).reshape(ROWS, 2 * COLUMNS)
        tl.store(grad_pre_ptr + at, both.to(element), mask=is_wide)
    else:
        tl.store(grad_pre_ptr + at, grad_gate.to(element), mask=is_own)
        if GATE == "halves":
            tl.store(grad_pre_ptr + at + H, grad_up.to(element), mask=is_own)
    scaled = hidden * scale if SCALE else hidden
    tl.store(hidden_ptr + row_start * H + outs[None, :], scaled.to(element), mask=is_own)
    return tl.sum(tl.where((outs < H)[None, :], acc * hidden, 0.0), axis=1)


@triton.jit(do_not_specialize=["P"])
def grad_pre_kernel(
    grad_ptr, w, pre_ptr, weights_ptr, pair_of_row_ptr, grad_pre_ptr, hidden_ptr, parts_ptr,
    offsets_ptr, tiles_ptr, E, P, D, H, OUT_TILES,
    grad_stride, w_stride_e, w_stride_o, w_stride_i, limit, alpha,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, TOP_K: tl.constexpr, SCALE: tl.constexpr,
    TMA: tl.constexpr, IN_FIRST: tl.constexpr, EVEN_IN: tl.constexpr, EVEN_OUT: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    GROUP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """w is W_down as (e h d); parts (OUT_TILES p) are the gradients of s, one part for each tile of h.

    The tile is finished at most 32 columns at a time: pre, hidden and their gradients of a whole tile would
    need six times the registers of the accumulator.
    """
    expert, row, end, out_tile = find_tile(
        tl.program_id(0), offsets_ptr, tiles_ptr, E, OUT_TILES, ROWS, GROUP, EXPERTS
    )
    if expert < E:
        rows = row + tl.arange(0, ROWS)
        pairs = tl.load(pair_of_row_ptr + tl.minimum(rows, end - 1)).to(tl.int32)
        grad_rows = grad_ptr + (pairs // TOP_K).to(tl.int64)[:, None] * grad_stride
        acc = zeros(ROWS, OUTS, SWAP)
        for start in range(0, D, INS):
            grad = load_columns(grad_rows, start + tl.arange(0, INS), D, EVEN_IN)
            tile_w = load_weight(
                w, expert, out_tile * OUTS, start, H, D, w_stride_e, w_stride_o, w_stride_i,
                OUTS, INS, TMA, IN_FIRST, EVEN_IN, EVEN_OUT,
            )  # fmt: skip
            acc = product(grad, tile_w, acc, SWAP, PRECISION)
        acc = unswap(acc, SWAP)
        row_start = rows.to(tl.int64)[:, None]
        has_row = (rows < end)[:, None]
        scale = tl.load(weights_ptr + pairs).to(tl.float32)[:, None] if SCALE else 1.0
        part = tl.zeros((ROWS,), tl.float32)
        pieces = eighths(acc, ROWS, OUTS) if OUTS > 128 else quarters(acc, ROWS, OUTS)
        COUNT: tl.constexpr = 8 if OUTS > 128 else 4
        for i in tl.static_range(COUNT):
            part += finish_columns(
                pieces[i], scale, row_start, has_row, out_tile * OUTS + i * (OUTS // COUNT), pre_ptr,
                grad_pre_ptr, hidden_ptr, H, limit, alpha, ACTIVATION, GATE, SCALE, ROWS, OUTS // COUNT,
            )  # fmt: skip
        if SCALE:
            tl.store(parts_ptr + out_tile.to(tl.int64) * P + rows, part, mask=rows < end)


def grad_pre(
    grad: Tensor, weight: Tensor, pre: Tensor, weights: Tensor | None, plan: Plan, settings: Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of pre (p 2h); hidden times the routing weight (p h); parts of the weights' gradient (n p).

    grad (t d) with a last stride of 1, weight W_down (e d h) in any strides, pre contiguous, weights (t k)
    contiguous. Without weights nothing is scaled and there are no parts.
    """
    num_experts, d, h = weight.shape
    config = choose_config(
        "grad_pre", target_of(grad.device), grad.dtype, plan.pairs, num_experts, d, h,
        batch_invariant=settings.batch_invariant,
    )  # fmt: skip
    out_tiles = ceil_div(h, config.outs)
    grad_of_pre, hidden = torch.empty_like(pre), pre.new_empty(plan.pairs, h)
    parts = None if weights is None else pre.new_empty(out_tiles, plan.pairs, dtype=torch.float32)
    arguments = {
        "grad_ptr": grad,
        "pre_ptr": pre,
        "weights_ptr": pre if weights is None else weights,
        "pair_of_row_ptr": plan.pair_of_row,
        "grad_pre_ptr": grad_of_pre,
        "hidden_ptr": hidden,
        "parts_ptr": pre if parts is None else parts,
        "P": plan.pairs,
        "D": d,
        "H": h,
        "OUT_TILES": out_tiles,
        "grad_stride": grad.stride(0),
        "limit": settings.limit,
        "alpha": settings.alpha,
        "ACTIVATION": settings.activation,
        "GATE": settings.gate,
        "TOP_K": plan.top_k,
        "SCALE": weights is not None,
        "EVEN_IN": d % config.ins == 0,
        "EVEN_OUT": h % config.outs == 0,
        "SWAP": config.swap,
        "PRECISION": precision(),
        "ROWS": config.rows,
        "OUTS": config.outs,
        "INS": config.ins,
        "GROUP": config.group,
        **weight_arguments(weight.mT, config),
        **plan.tile_arguments(config),
    }
    tiles = plan.tile_bound(config.rows) * out_tiles
    launch(grad_pre_kernel, (tiles,), arguments, **config.options)
    return grad_of_pre, hidden, parts
