"""`experts_ffn` without Triton: expert by expert, in blocks of rows that stay in cache.

Forward, for the rows r of expert i (tokens t_r, weights s_r):
    H = x[t_r] up_iᵀ      A = act(H)      y[t_r] += s_r (A down_iᵀ)
Backward, with G = dy[t_r], A recomputed:
    P = G down_i          ds_r = <P, A>        dH = act'(H) (s_r P)
    ddown_i = Gᵀ (s_r A)  dup_i = dHᵀ x[t_r]   dx[t_r] += dH up_i
With weights_on_input s_r meets x instead, so that dX = dH up_i is the gradient of s_r x[t_r]:
    H = (s_r x[t_r]) up_iᵀ     y[t_r] += A down_iᵀ
    dH = act'(H) P             ds_r = <dX, x[t_r]>     dx[t_r] += s_r dX
    ddown_i = Gᵀ A             dup_i = dHᵀ (s_r x[t_r])
Kept between the two: x and H. Sums over a token's choices run in expert order, in float32 or wider.

Decisions
1. Rows are gathered, used and added block by block: in float32 there is no (p d) buffer. A block is many
   small experts or a piece of a large one, so the calls around the products are few at any number of
   experts. All blocks of a thread work in the same buffers.
2. Weight gradients are written expert by expert into one buffer. Autograd through `weight[i]` would make a
   full-size gradient for every expert: 62 s instead of 0.4 s for 256 experts.
3. Large CPU buffers come from numpy, which asks Linux for huge pages: first touch of a fresh 256 MB buffer
   takes 33 ms instead of 162 ms. Large zeros come from calloc: the gradient of an idle expert costs nothing.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.config import Activation
from moe.ops.activations import activate_backward_into, activate_into
from moe.ops.shares import split_experts, sum_over_shares

BLOCK_ROWS = 1024  # 2 MB of float32 at d=512
_HUGE_PAGE_BYTES = 1 << 22  # numpy asks for huge pages from 4 MB on
_FRESH_BYTES = 1 << 25  # glibc takes more than 32 MB from the kernel, already zero


class Projections(NamedTuple):
    """The experts' weights: up (e o d), down (e d h), their biases (e o), (e d) or None."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


class Nonlinearity(NamedTuple):
    """The arguments of `activate` after the tensor."""

    activation: Activation
    interleaved: bool
    limit: float
    alpha: float


class Block(NamedTuple):
    """Consecutive rows, the experts they belong to, how many of them each one has.

    `continues` says that the first expert had rows in the block before.
    """

    rows: slice
    experts: list[int]
    sizes: list[int]
    continues: bool


def forward(
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    offsets: Tensor,
    projections: Projections,
    nonlinearity: Nonlinearity,
    weights_on_input: bool,
    pre: Tensor | None,
) -> Tensor:
    """y (t d). Writes the pre-activation into pre (p o) when given."""
    scale = weights.flatten().index_select(0, pair_of_row).to(_sum_dtype(x))[:, None]
    token_of_row = pair_of_row // weights.shape[1]
    return _forward(
        x, scale, token_of_row, offsets.tolist(), projections, nonlinearity, weights_on_input, pre
    )


def forward_few(
    x: Tensor, weights: Tensor, experts: Tensor, projections: Projections, nonlinearity: Nonlinearity
) -> Tensor:
    """`forward` for experts (t k) that nobody has sorted: a few numbers are sorted faster by Python."""
    num_experts, top_k = projections.down.shape[0], experts.shape[1]
    ids = experts.flatten().tolist()
    pairs = [pair for pair, expert in enumerate(ids) if 0 <= expert < num_experts]
    pairs.sort(key=ids.__getitem__)
    sizes = [0] * num_experts
    for pair in pairs:
        sizes[ids[pair]] += 1
    pair_of_row = torch.tensor(pairs, dtype=torch.int64, device=x.device)
    scale = weights.flatten()[pair_of_row].to(_sum_dtype(x))[:, None]
    bounds = list(accumulate(sizes, initial=0))
    return _forward(x, scale, pair_of_row // top_k, bounds, projections, nonlinearity, False, None)


def _forward(
    x: Tensor,
    scale: Tensor,
    token_of_row: Tensor,
    bounds: Sequence[int],
    projections: Projections,
    nonlinearity: Nonlinearity,
    weights_on_input: bool,
    pre: Tensor | None,
) -> Tensor:
    """y (t d), given weight (p 1) and token (p) of each row; bounds (e+1) is `offsets` as a list."""
    up, down, up_bias, down_bias = projections
    before, after = (scale, None) if weights_on_input else (None, scale)

    def add_outputs(y: Tensor, experts: range) -> None:
        scratch = Scratch(x)
        for block in _blocks(bounds, experts, x):
            rows, tokens = block.rows, token_of_row[block.rows]
            own = torch.index_select(x, 0, tokens, out=scratch("own", len(tokens), x.shape[1]))
            own = _times(own, before, rows)
            hidden = scratch("hidden", len(tokens), up.shape[1]) if pre is None else pre[rows]
            _multiply(own, up.mT, up_bias, block, out=hidden)
            a = activate_into(scratch("a", len(tokens), down.shape[2]), hidden, *nonlinearity)
            outputs = _multiply(a, down.mT, down_bias, block, out=own)  # own has done its work
            y.index_add_(0, tokens, _times(outputs.to(y.dtype), after, rows))

    bytes_of_expert = (up[0].numel() + down[0].numel()) * x.element_size()
    ranges = split_experts(bounds, x.device, bytes_of_expert)
    return sum_over_shares(add_outputs, ranges, lambda: _zeros(x)).to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    offsets: Tensor,
    projections: Projections,
    nonlinearity: Nonlinearity,
    weights_on_input: bool,
    pre: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights and the four projections; an empty tensor where `needs` says no."""
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    up, down, _, down_bias = projections
    grad_up, grad_down, grad_up_bias, grad_down_bias = (
        _gradient_buffer(tensor, offsets) if tensor is not None and need else x.new_empty(0)
        for tensor, need in zip(projections, needs[2:], strict=True)
    )
    token_of_row = pair_of_row // weights.shape[1]
    scale = weights.flatten().index_select(0, pair_of_row)[:, None]
    before, after = (scale.to(_sum_dtype(x)), None) if weights_on_input else (None, scale.to(x.dtype))
    grad_scale = scale.new_zeros(scale.shape[0], dtype=_sum_dtype(x))
    bounds = offsets.tolist()

    def add_gradients(grad_x: Tensor, experts: range) -> None:
        scratch = Scratch(x)
        for block in _blocks(bounds, experts, x):
            rows, tokens = block.rows, token_of_row[block.rows]
            h, ones = pre[rows], x.new_ones(len(tokens), 1)
            g = torch.index_select(grad, 0, tokens, out=scratch("g", len(tokens), x.shape[1]))
            own = torch.index_select(x, 0, tokens, out=scratch("own", len(tokens), x.shape[1]))
            a = activate_into(scratch("a", len(tokens), down.shape[2]), h, *nonlinearity)
            p = _multiply(g, down, None, block, out=scratch("p", len(tokens), down.shape[2]))
            if need_weights and not weights_on_input:
                grad_scale[rows] = _row_dot(p, a, grad_x.dtype) + _bias_dot(g, down_bias, block, grad_x.dtype)
            p, a = _times(p, after, rows), _times(a, after, rows)
            dh = activate_backward_into(scratch("dh", len(tokens), up.shape[1]), h, p, *nonlinearity)
            if need_down:
                _accumulate(grad_down, g, a, block)
            if need_down_bias:
                _accumulate(grad_down_bias[..., None], g, ones if after is None else after[rows], block)
            if need_up_bias:
                _accumulate(grad_up_bias[..., None], dh, ones, block)
            if need_x or (need_weights and weights_on_input):
                dx = _multiply(dh, up, None, block, out=g)  # g has done its work
                if need_weights and weights_on_input:
                    grad_scale[rows] = _row_dot(dx, own, grad_x.dtype)
                if need_x:
                    grad_x.index_add_(0, tokens, _times(dx.to(grad_x.dtype), before, rows))
            if need_up:
                _accumulate(grad_up, dh, _times(own, before, rows), block)

    bytes_of_expert = (up[0].numel() + down[0].numel()) * x.element_size()
    ranges = split_experts(bounds, x.device, bytes_of_expert)
    grad_x = sum_over_shares(add_gradients, ranges, lambda: _zeros(x))
    grad_weights = torch.empty_like(grad_scale).scatter_(0, pair_of_row, grad_scale).view(weights.shape)
    return (
        grad_x.to(x.dtype) if need_x else x.new_empty(0),
        grad_weights.to(weights.dtype) if need_weights else x.new_empty(0),
        grad_up,
        grad_down,
        grad_up_bias,
        grad_down_bias,
    )


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """rows (p i) @ weight (e i o) of the expert that owns each row -> (p o); 0 where nobody does."""
    outputs = allocate((rows.shape[0], weight.shape[2]), rows)
    bounds = offsets.tolist()
    for block in _blocks(bounds, range(weight.shape[0]), rows):
        _multiply(rows[block.rows], weight, bias, block, out=outputs[block.rows])
    outputs[bounds[-1] :].zero_()
    return outputs


def grouped_linear_weight_grads(
    grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight (e o i) and bias (e o), given grad (p o) and rows (p i)."""
    grad_weight = _gradient_buffer(weight, offsets)
    grad_bias = grad.new_zeros(weight.shape[:2])
    ones = grad.new_ones(grad.shape[0], 1)
    for block in _blocks(offsets.tolist(), range(weight.shape[0]), rows):
        _accumulate(grad_weight, grad[block.rows], rows[block.rows], block)
        _accumulate(grad_bias[..., None], grad[block.rows], ones[block.rows], block)
    return grad_weight, grad_bias


class Scratch:
    """Buffers that all blocks of a thread use in turn; fresh ones would be paid for page by page."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        """Uninitialised (rows columns); what the name held before is gone."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[0] < rows:
            buffer = self.buffers[name] = allocate((rows, columns), self.like)
        return buffer[:rows]


def allocate(shape: Sequence[int], like: Tensor, *, zero: bool = False) -> Tensor:
    """A contiguous tensor, uninitialised or zero, with the dtype and device of `like`."""
    bytes_needed = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or bytes_needed < _HUGE_PAGE_BYTES:
        make = torch.zeros if zero else torch.empty
        return make(tuple(shape), dtype=like.dtype, device=like.device)
    bytes_ = np.zeros(bytes_needed, np.uint8) if zero else np.empty(bytes_needed, np.uint8)
    return torch.from_numpy(bytes_).view(like.dtype).view(tuple(shape))


def _gradient_buffer(weight: Tensor, offsets: Tensor) -> Tensor:
    """Shaped and strided like weight (e ...): 0 where an expert owns no rows, else to be written."""
    order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    rows = offsets.diff().tolist()
    is_fresh = 0 in rows and weight.numel() * weight.element_size() > _FRESH_BYTES
    buffer = allocate([weight.shape[axis] for axis in order], weight, zero=is_fresh)
    buffer = buffer.permute([order.index(axis) for axis in range(weight.dim())])
    for expert, own in enumerate(rows):
        if not own and not is_fresh:
            buffer[expert].zero_()
    return buffer


def _blocks(bounds: Sequence[int], experts: range, like: Tensor) -> Iterator[Block]:
    """Cut the rows of `experts` into blocks of about BLOCK_ROWS.

    16-bit experts are never cut: their sums belong in one product. Off the CPU a block is one expert, so
    that no token occurs twice in it and adding needs no order.
    """
    can_cut = like.dtype in (torch.float32, torch.float64)
    least = BLOCK_ROWS if like.device.type == "cpu" else 1
    first_row, owners, sizes, continues = bounds[experts.start], list[int](), list[int](), False
    row = first_row
    while row < bounds[experts.stop]:
        expert = bisect_right(bounds, row) - 1  # straight to the next expert that owns rows
        end = bounds[expert + 1]
        while row < end:
            stop = min(end, max(first_row + BLOCK_ROWS, row + BLOCK_ROWS // 2)) if can_cut else end
            owners.append(expert)
            sizes.append(stop - row)
            row = stop
            if row - first_row >= least:
                yield Block(slice(first_row, row), owners, sizes, continues)
                first_row, owners, sizes, continues = row, [], [], row < end
    if owners:
        yield Block(slice(first_row, row), owners, sizes, continues)


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, block: Block, out: Tensor) -> Tensor:
    """out (r o) = rows (r i) @ weight (e i o) + bias (e o) of the expert that owns each row."""
    for expert, own, result in zip(
        block.experts, rows.split(block.sizes), out.split(block.sizes), strict=True
    ):
        if bias is None:
            torch.mm(own, weight[expert], out=result)
        else:
            torch.addmm(bias[expert], own, weight[expert], out=result)
    return out


def _accumulate(totals: Tensor, left: Tensor, right: Tensor, block: Block) -> None:
    """totals[i] (o n) = leftᵀ @ right over the rows of expert i, added to what an earlier block left."""
    beta = int(block.continues)
    for expert, own_left, own_right in zip(
        block.experts, left.split(block.sizes), right.split(block.sizes), strict=True
    ):
        total = totals[expert]
        torch.addmm(total, own_left.T, own_right, beta=beta, out=total)
        beta = 0


def _times(tensor: Tensor, scale: Tensor | None, rows: slice) -> Tensor:
    """tensor (r n) times scale (p 1) of these rows, in place; as it is without a scale."""
    return tensor if scale is None else tensor.mul_(scale[rows])


def _row_dot(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vecdot(left.to(dtype), right.to(dtype))


def _bias_dot(rows: Tensor, bias: Tensor | None, block: Block, dtype: torch.dtype) -> Tensor | int:
    """<row, bias of its expert> for each row (r), or 0 without a bias."""
    if bias is None:
        return 0
    own = zip(block.experts, rows.split(block.sizes), strict=True)
    return torch.cat([own_rows.to(dtype) @ bias[expert].to(dtype) for expert, own_rows in own])


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=_sum_dtype(x), device=x.device)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
