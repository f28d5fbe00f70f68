"""Attention over all keys from attention over parts of them.

With lse_i the logarithm of part i's softmax denominator and out_i its result, lse = log of the sum of
exp(lse_i), and out = the sum of exp(lse_i - lse) out_i.
"""

# In kernel bodies types are Triton's.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from .attend import LN_2, LOG2_E, NOTHING, finite, over
from .launch import launch, power_of_2

MERGED_NUMBERS = 4096  # of a program's tile: 32 a thread, all on their way at once
FEW_PARTS = 16


@triton.jit(do_not_specialize=["OUT_ROWS", "PARTS"])
def merge_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr,  # (parts b n s c), (parts b n s), (b n s c), (b n s)
    OUT_ROWS, C, PARTS, ADD: tl.constexpr, SOME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = sum over parts of exp(lse - lse of all) part, of one row; in the order of the parts.

    ADD: what out and lse hold is the first part.
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    top, total = tl.full((), NOTHING, tl.float32), tl.zeros((), tl.float32)
    acc = tl.zeros((CHANNELS,), tl.float32)
    if ADD:
        top = tl.load(lse_ptr + row)
        total = tl.where(top == NOTHING, 0.0, 1.0)
        acc = tl.load(out_ptr + row * C + channels, mask=channels < C, other=0.0)
    for first in range(0, PARTS, SOME):
        parts = first + tl.arange(0, SOME)
        rows = parts.to(tl.int64) * OUT_ROWS + row
        lse = tl.load(part_lse_ptr + rows, mask=parts < PARTS, other=NOTHING)
        exists = (parts < PARTS)[:, None] & (channels < C)[None, :]
        part = tl.load(parts_ptr + rows[:, None] * C + channels[None, :], mask=exists, other=0.0)
        new = tl.maximum(top, tl.max(lse, 0))
        base = finite(new)
        weights, fade = tl.exp2((lse - base) * LOG2_E), tl.exp2((top - base) * LOG2_E)
        acc = acc * fade + tl.sum(weights[:, None] * part, 0)
        top, total = new, total * fade + tl.sum(weights, 0)
    tl.store(out_ptr + row * C + channels, over(acc, total), mask=channels < C)
    tl.store(lse_ptr + row, top + tl.log2(total) * LN_2)


def merge_parts(
    part_out: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, parts: int, *, add: bool
) -> None:
    """Write into out (b n s c) and lse (b n s) what the first `parts` of part_out and part_lse make together.

    add: what out and lse hold is one part more.
    """
    c = out.shape[-1]
    channels = max(16, power_of_2(c))
    arguments = {
        "parts_ptr": part_out,
        "part_lse_ptr": part_lse,
        "out_ptr": out,
        "lse_ptr": lse,
        "OUT_ROWS": lse.numel(),
        "C": c,
        "PARTS": parts,
        "ADD": add,
        "SOME": FEW_PARTS if parts <= FEW_PARTS else MERGED_NUMBERS // channels,
        "CHANNELS": channels,
    }
    launch(merge_kernel, (lse.numel(),), arguments)
