"""Up-projection of the experts with its activation, rows gathered on the way: pass 1 of the forward.

pre[r] = W_up[e] x[token of r] + b_up[e], hidden[r] = act(pre[r]) for the rows r of expert e.
x (t d), W_up (e 2h d) or (e h d) without a gate, pre (p 2h), hidden (p h). A tile of x meets one of W_up,
gate rows and as many up rows; nothing that is gathered is ever written (SonicMoE, 2512.14080).
"""

# In kernel bodies types are Triton's.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import activated
from .config import Config, choose_config
from .launch import ceil_div, launch, target_of
from .settings import Settings
from .tiles import (
    Plan,
    can_describe,
    find_tile,
    halves,
    has_descriptors,
    load_columns,
    load_weight,
    precision,
    product,
    quarters,
    unswap,
    weight_arguments,
    weight_strides,
    zeros,
)


@triton.jit
def finish_columns(
    first, second, scale, bias, row_start, has_row, out, pre_ptr, hidden_ptr, H, bias_stride_o, limit, alpha,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, SCALE: tl.constexpr,
    KEEP_PRE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From products (ROWS COLUMNS), which stand from column `out` on: writes pre and hidden."""
    PRE: tl.constexpr = 1 if GATE == "none" else 2
    WIDTH: tl.constexpr = COLUMNS // 2 if GATE == "pairs" else COLUMNS
    columns = out + tl.arange(0, COLUMNS)
    is_column = columns < (2 * H if GATE == "pairs" else H)
    if SCALE:
        first, second = first * scale, second * scale
    if HAS_BIAS:
        first += tl.load(bias + columns * bias_stride_o, is_column, 0.0).to(tl.float32)[None, :]
        if GATE == "halves":
            second += tl.load(bias + (H + columns) * bias_stride_o, is_column, 0.0).to(tl.float32)[None, :]
    if KEEP_PRE:
        pre = pre_ptr + row_start * (PRE * H) + columns[None, :]
        tl.store(pre, first.to(pre_ptr.dtype.element_ty), mask=has_row & is_column[None, :])
        if GATE == "halves":
            tl.store(pre + H, second.to(pre_ptr.dtype.element_ty), mask=has_row & is_column[None, :])
    if GATE == "pairs":
        first, second = first.reshape(ROWS, WIDTH, 2).split()
    hidden = activated(first, second, limit, alpha, ACTIVATION)
    outs = (out // 2 if GATE == "pairs" else out) + tl.arange(0, WIDTH)
    to = hidden_ptr + row_start * H + outs[None, :]
    tl.store(to, hidden.to(hidden_ptr.dtype.element_ty), mask=has_row & (outs < H)[None, :])


@triton.jit
def load_halves(
    weight, expert, out, in_start, H, D, stride_e, stride_o, stride_i,
    OUTS: tl.constexpr, INS: tl.constexpr, TMA: tl.constexpr, EVEN_IN: tl.constexpr, EVEN_OUT: tl.constexpr,
):  # fmt: skip
    """Tile (2 OUTS, INS) of the weight (e 2h d) of one expert: rows of the gate, then as many up rows.

    weight: a descriptor of (e 2 h d), or a pointer.
    """
    if TMA:
        return weight.load([expert, 0, out, in_start]).reshape(2 * OUTS, INS)
    else:
        numbers = tl.arange(0, 2 * OUTS)
        outs = out + numbers % OUTS
        ins = tl.arange(0, INS).to(tl.int64)
        tile = weight + expert.to(tl.int64) * stride_e + tl.cast(in_start, tl.int64) * stride_i
        tile += (outs + numbers // OUTS * H).to(tl.int64)[:, None] * stride_o + ins[None, :] * stride_i
        if EVEN_IN and EVEN_OUT:
            return tl.load(tile)
        else:
            return tl.load(tile, mask=(outs < H)[:, None] & (in_start + ins < D)[None, :], other=0.0)


@triton.jit
def up_kernel(
    x_ptr, w, bias_ptr, weights_ptr, pair_of_row_ptr, pre_ptr, hidden_ptr,
    offsets_ptr, tiles_ptr, E, D, H, OUT_TILES,
    x_stride, w_stride_e, w_stride_o, w_stride_i, bias_stride_e, bias_stride_o, limit, alpha,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr, KEEP_PRE: tl.constexpr, TMA: tl.constexpr, IN_FIRST: tl.constexpr,
    EVEN_IN: tl.constexpr, EVEN_OUT: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """GATE: "none"; "halves", gate rows before up rows; "pairs", interleaved. With a gate the one accumulator
    is twice as wide: the wider a product, the less often it reads its rows from shared memory.
    """
    WIDTH: tl.constexpr = OUTS if GATE == "none" else 2 * OUTS
    EACH: tl.constexpr = 2 if GATE == "pairs" else 1
    PIECE: tl.constexpr = OUTS // 4 if GATE == "halves" else WIDTH // 4
    expert, row, end, out_tile = find_tile(
        tl.program_id(0), offsets_ptr, tiles_ptr, E, OUT_TILES, ROWS, GROUP, EXPERTS
    )
    if expert < E:
        rows = row + tl.arange(0, ROWS)
        pairs = tl.load(pair_of_row_ptr + tl.minimum(rows, end - 1)).to(tl.int32)
        x_rows = x_ptr + (pairs // TOP_K).to(tl.int64)[:, None] * x_stride
        out = out_tile * EACH * OUTS
        acc = zeros(ROWS, WIDTH, SWAP)
        for start in range(0, D, INS):
            ins = start + tl.arange(0, INS)
            x = load_columns(x_rows, ins, D, EVEN_IN)
            if GATE == "halves":
                tile_w = load_halves(
                    w, expert, out, start, H, D, w_stride_e, w_stride_o, w_stride_i,
                    OUTS, INS, TMA, EVEN_IN, EVEN_OUT,
                )  # fmt: skip
            else:
                tile_w = load_weight(
                    w, expert, out, start, EACH * H, D, w_stride_e, w_stride_o, w_stride_i,
                    WIDTH, INS, TMA, IN_FIRST, EVEN_IN, EVEN_OUT,
                )  # fmt: skip
            acc = product(x, tile_w, acc, SWAP, PRECISION)
        acc = unswap(acc, SWAP)
        if GATE == "halves":
            gate, up = halves(acc, ROWS, WIDTH)
            first, second = quarters(gate, ROWS, OUTS), quarters(up, ROWS, OUTS)
        else:
            first = quarters(acc, ROWS, WIDTH)
            second = first
        scale = tl.load(weights_ptr + pairs).to(tl.float32)[:, None] if SCALE else 1.0
        bias = bias_ptr + expert.to(tl.int64) * bias_stride_e
        has_row = (rows < end)[:, None]
        for i in tl.static_range(4):
            finish_columns(
                first[i], second[i], scale, bias, rows.to(tl.int64)[:, None], has_row, out + i * PIECE,
                pre_ptr, hidden_ptr, H, bias_stride_o, limit, alpha, ACTIVATION, GATE, HAS_BIAS, SCALE,
                KEEP_PRE, ROWS, PIECE,
            )  # fmt: skip


def up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    plan: Plan,
    settings: Settings,
    *,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    """hidden (p h) and, with keep_pre, the pre-activation (p 2h), or (p h) without a gate.

    x (t d) with a last stride of 1, weight (e o d) in any strides, bias (e o). weights (t k), contiguous:
    each row is multiplied by its own before the bias is added, as if x had been (Llama 4); None elsewhere.
    """
    num_experts, width, d = weight.shape
    h = width // 2 if settings.gate != "none" else width
    target = target_of(x.device)
    config = choose_config(
        "up", target, x.dtype, plan.pairs, num_experts, d, h, batch_invariant=settings.batch_invariant
    )
    pre = x.new_empty(plan.pairs, width) if keep_pre else None
    hidden = x.new_empty(plan.pairs, h)
    out_tiles = ceil_div(h, config.outs)
    arguments = {
        "x_ptr": x,
        "bias_ptr": x if bias is None else bias,
        "weights_ptr": x if weights is None else weights,
        "pair_of_row_ptr": plan.pair_of_row,
        "pre_ptr": hidden if pre is None else pre,
        "hidden_ptr": hidden,
        "D": d,
        "H": h,
        "OUT_TILES": out_tiles,
        "x_stride": x.stride(0),
        "bias_stride_e": 0 if bias is None else bias.stride(0),
        "bias_stride_o": 0 if bias is None else bias.stride(1),
        "limit": settings.limit,
        "alpha": settings.alpha,
        "ACTIVATION": settings.activation,
        "GATE": settings.gate,
        "TOP_K": plan.top_k,
        "HAS_BIAS": bias is not None,
        "SCALE": weights is not None,
        "KEEP_PRE": keep_pre,
        "EVEN_IN": d % config.ins == 0,
        "EVEN_OUT": h % config.outs == 0,
        "SWAP": config.swap,
        "PRECISION": precision(),
        "ROWS": config.rows,
        "OUTS": config.outs,
        "INS": config.ins,
        "GROUP": config.group,
        **operand_of(weight, settings.gate, config),
        **plan.tile_arguments(config),
    }
    tiles = plan.tile_bound(config.rows) * out_tiles
    launch(up_kernel, (tiles,), arguments, **config.options)
    return hidden, pre


def operand_of(weight: Tensor, gate: str, config: Config) -> Mapping[str, Any]:
    """W_up for the kernel; separate halves come in one tile, by pointer where they are stored as (e d 2h)."""
    if gate != "halves":
        return weight_arguments(weight, config, width=2 if gate == "pairs" else 1)
    view = weight.unflatten(1, (2, weight.shape[1] // 2))
    tma = config.tma and has_descriptors(weight.device) and can_describe(view)
    box = [1, 2, config.outs, config.ins]
    return {
        "w": TensorDescriptor(view, list(view.shape), list(view.stride()), box) if tma else weight,
        "TMA": tma,
        "IN_FIRST": False,
        **weight_strides(weight),
    }
