"""Attention over a cache as launches: softmax(scale q kᵀ) v and the logarithm of the softmax's denominator.

queries (b n s c), keys and values (b g l c) in any strides -> out (b n s c), lse (b n s), both float32. The
query heads that share a key head, n = g r, and the sequences where they share a cache, are rows of one matrix
((s b r) c) for a head of keys; position by position, so that the rows of a tile see nearly the same keys.

Each program walks over keys and keeps, for its rows, the largest logit so far, the sum of the weights
relative to it and the weighted sum of the values (online softmax, 1805.02867; 2205.14135).
"""

# In kernel bodies types are Triton's.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_schedule import Schedule
from .launch import ceil_div, launch, power_of_2
from .tiles import dot

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(float("-inf"))  # the lse of no keys
VARYING = ["M", "S", "L", "FIRST", "SHARED", "TILES", "PARTS", "START", "PART_KEYS", "END", "OUT_ROWS"]


@triton.jit
def load_keys(
    source, sequence, head, key, L, C, stride_b, stride_g, stride_l, stride_c,
    KEYS: tl.constexpr, CHANNELS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Tile (KEYS CHANNELS) of one head's keys or values from `key` on, 0 beyond their ends.

    source: a descriptor or a pointer. EVEN: all CHANNELS exist. EDGE: the tile may cross the last key.
    """
    if TMA:
        return source.load([sequence, head, key, 0]).reshape(KEYS, CHANNELS)
    else:
        keys, channels = key + tl.arange(0, KEYS), tl.arange(0, CHANNELS).to(tl.int64)
        at = source + sequence.to(tl.int64) * stride_b + head.to(tl.int64) * stride_g
        at += keys[:, None].to(tl.int64) * stride_l + channels[None, :] * stride_c
        if EDGE and EVEN:
            return tl.load(at, mask=(keys < L)[:, None], other=0.0)
        elif EDGE:
            return tl.load(at, mask=(keys < L)[:, None] & (channels < C)[None, :], other=0.0)
        elif EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=(channels < C)[None, :], other=0.0)


@triton.jit
def add_keys(
    q, keys, values, key, seen, top, total, acc, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """top, total and acc with KEYS more keys; scale times log2 e. EDGE: row i sees keys below seen[i] only.

    q is not scaled beforehand: in 16 bits that would be one more rounding, of logits up to 90.
    """
    logits = dot(q, keys.T, tl.zeros((ROWS, KEYS), tl.float32), "ieee")
    if EDGE:
        logits = tl.where((key + tl.arange(0, KEYS))[None, :] < seen[:, None], logits, NOTHING)
    new = tl.maximum(top, tl.max(logits, 1) * scale)
    base = finite(new) if EDGE else new
    weights = tl.exp2(logits * scale - base[:, None])
    fade = tl.exp2(top - base)
    acc = dot(weights.to(values.dtype), values, acc * fade[:, None], "ieee")
    return new, total * fade + tl.sum(weights, 1), acc


@triton.jit
def finite(top):
    """0 in place of the largest logit of no keys: weights relative to it are 0 then, not NaN."""
    return tl.where(top == NOTHING, 0.0, top)


@triton.jit
def over(part, whole):
    """part / whole; 0 / 0 is 0, and NaN stays."""
    return part * tl.where(whole == 0, 0.0, 1 / whole)


@triton.jit(do_not_specialize=VARYING)
def attend_kernel(
    q_ptr, k, v, out_ptr, lse_ptr,  # (b n s c), two of (b g l c), (parts b n s c), (parts b n s)
    q_stride_b, q_stride_n, q_stride_s, q_stride_c, k_stride_b, k_stride_g, k_stride_l, k_stride_c,
    v_stride_b, v_stride_g, v_stride_l, v_stride_c, M, S, L, C, G, R, FIRST, SHARED, TILES, PARTS, START,
    PART_KEYS, END, OUT_ROWS, scale, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (tile, part, head of keys): ROWS of M rows over PART_KEYS of the keys START to END - 1.

    SHARED rows have one position. FIRST: with CAUSAL, the last key that position 0 sees.
    """
    tile = tl.program_id(0) % TILES
    if CAUSAL:  # what sees most keys begins first
        tile = TILES - 1 - tile
    part = tl.program_id(0) // TILES % PARTS
    sequence = tl.program_id(0) // TILES // PARTS // G
    head = tl.program_id(0) // TILES // PARTS % G

    rows, channels = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    position = rows // SHARED
    query_head = head * R + rows % SHARED % R
    owner = (sequence + rows % SHARED // R).to(tl.int64)
    exists = (rows < M)[:, None] & (channels < C)[None, :]
    own = owner * q_stride_b + query_head.to(tl.int64) * q_stride_n + position.to(tl.int64) * q_stride_s
    q = tl.load(q_ptr + own[:, None] + channels[None, :].to(tl.int64) * q_stride_c, mask=exists, other=0.0)
    q = q.to(k.dtype if TMA else k.dtype.element_ty)

    start = START + part * PART_KEYS
    end = tl.minimum(start + PART_KEYS, END)
    whole = end
    if CAUSAL:
        seen = tl.minimum(position + FIRST + 1, end)
        whole = tl.minimum(tile * ROWS // SHARED + FIRST + 1, end)
        end = tl.minimum((tl.minimum(tile * ROWS + ROWS, M) - 1) // SHARED + FIRST + 1, end)
    else:
        seen = tl.full((ROWS,), 0, tl.int32) + end
    whole = start + tl.maximum(whole - start, 0) // KEYS * KEYS

    top, total = tl.full((ROWS,), NOTHING, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    for key in range(start, whole, KEYS):
        keys = load_keys(
            k, sequence, head, key, L, C, k_stride_b, k_stride_g, k_stride_l, k_stride_c,
            KEYS, CHANNELS, TMA, EVEN, False,
        )  # fmt: skip
        values = load_keys(
            v, sequence, head, key, L, C, v_stride_b, v_stride_g, v_stride_l, v_stride_c,
            KEYS, CHANNELS, TMA, EVEN, False,
        )  # fmt: skip
        top, total, acc = add_keys(q, keys, values, key, seen, top, total, acc, scale, ROWS, KEYS, False)
    for key in range(whole, end, KEYS):  # the edge: the last keys of all, and those not seen by all rows
        keys = load_keys(
            k, sequence, head, key, L, C, k_stride_b, k_stride_g, k_stride_l, k_stride_c,
            KEYS, CHANNELS, TMA, EVEN, True,
        )  # fmt: skip
        values = load_keys(
            v, sequence, head, key, L, C, v_stride_b, v_stride_g, v_stride_l, v_stride_c,
            KEYS, CHANNELS, TMA, EVEN, True,
        )  # fmt: skip
        top, total, acc = add_keys(q, keys, values, key, seen, top, total, acc, scale, ROWS, KEYS, True)

    row = part.to(tl.int64) * OUT_ROWS + (owner * (G * R) + query_head) * S + position
    tl.store(out_ptr + row[:, None] * C + channels[None, :], over(acc, total[:, None]), mask=exists)
    tl.store(lse_ptr + row, (top + tl.log2(total)) * LN_2, mask=rows < M)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    first: int | None,
    schedule: Schedule,
    start: int,
    end: int,
    *,
    tma: bool,
) -> None:
    """What all rows take from keys start to end - 1, by parts: out (parts b n s c), lse (parts b n s)."""
    b, n, s, c = queries.shape
    sequences, g, seen, _ = keys.shape
    rows, parts = b * n * s // (sequences * g), schedule.parts(end - start)
    tiles, channels = ceil_div(rows, schedule.rows), max(16, power_of_2(c))
    block = [1, 1, schedule.keys, channels]
    arguments = {
        "q_ptr": queries,
        "k": _described(keys, block) if tma else keys,
        "v": _described(values, block) if tma else values,
        "out_ptr": out,
        "lse_ptr": lse,
        **_strides("q_stride", queries, "bnsc"),
        **_strides("k_stride", keys, "bglc"),
        **_strides("v_stride", values, "bglc"),
        "M": rows,
        "S": s,
        "L": seen,
        "C": c,
        "G": g,
        "R": n // g,
        "FIRST": 0 if first is None else first,
        "SHARED": rows // s,
        "TILES": tiles,
        "PARTS": parts,
        "START": start,
        "PART_KEYS": schedule.part_keys(end - start),
        "END": end,
        "OUT_ROWS": b * n * s,
        "scale": scale * LOG2_E.value,
        "CAUSAL": first is not None,
        "TMA": tma,
        "EVEN": c == channels,
        "ROWS": schedule.rows,
        "KEYS": schedule.keys,
        "CHANNELS": channels,
    }
    launch(
        attend_kernel, (tiles * parts * sequences * g,), arguments,
        num_warps=schedule.num_warps, num_stages=schedule.num_stages,
    )  # fmt: skip


def _described(cache: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(cache, list(cache.shape), list(cache.stride()), block)


def _strides(name: str, tensor: Tensor, axes: str) -> Mapping[str, Any]:
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}
