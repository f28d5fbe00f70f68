"""`experts_ffn` without Triton: one pass over the experts, every matrix product as large as its expert's rows.

Forward, for the rows r of expert i (tokens t_r, weights s_r):
    H = x[t_r] up_iᵀ      A = act(H)      y[t_r] += s_r (A down_iᵀ)
Backward, with G = dy[t_r], A recomputed:
    P = G down_i          ds_r = <P, A>        dH = act'(H) (s_r P)
    ddown_i = Gᵀ (s_r A)  dup_i = dHᵀ x[t_r]   dx[t_r] += dH up_i
Kept between the two: x and H. Sums over a token's choices run in expert order, in float32 or wider.

Decisions
1. No (p d) buffer: rows are gathered, used and added while they are in cache, in chunks of CHUNK rows.
2. Weight gradients are written expert by expert into one buffer. Autograd through `weight[i]` would make a
   full-size gradient for every expert: 62 s instead of 0.4 s for 256 experts.
3. Large CPU buffers come from numpy, which asks Linux for huge pages: first touch of a fresh 256 MB buffer
   takes 33 ms instead of 162 ms.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from moe.config import Activation
from moe.ops.activations import activate, activate_backward

CHUNK = 1024  # rows; 2 MB of float32 at d=512
_HUGE_PAGE_BYTES = 1 << 22  # numpy asks for huge pages from 4 MB on

_Settings = tuple[Activation, bool, float, float]  # activation, interleaved, limit, alpha


def forward(
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    offsets: Tensor,
    projections: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    settings: _Settings,
    pre: Tensor | None,
) -> Tensor:
    """y (t d). Writes the pre-activation into pre (p o) when given."""
    up_proj, down_proj, up_bias, down_bias = projections
    activation, interleaved, limit, alpha = settings
    ups, downs = up_proj.mT.unbind(), down_proj.mT.unbind()
    token_of_row = pair_of_row // weights.shape[1]
    y = torch.zeros_like(x, dtype=_sum_dtype(x))
    scale = weights.flatten()[pair_of_row].to(y.dtype)[:, None]
    for expert, rows in _chunks(offsets, x.dtype):
        tokens = token_of_row[rows]
        own = x.index_select(0, tokens)
        hidden = _linear(own, ups[expert], _row(up_bias, expert), None if pre is None else pre[rows])
        hidden = activate(hidden, activation, interleaved=interleaved, limit=limit, alpha=alpha)
        outputs = _linear(hidden, downs[expert], _row(down_bias, expert))
        y.index_add_(0, tokens, outputs.to(y.dtype).mul_(scale[rows]))
    return y.to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    offsets: Tensor,
    projections: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    settings: _Settings,
    pre: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weights and the four projections; an empty tensor where `needs` says no."""
    up_proj, down_proj, _, down_bias = projections
    activation, interleaved, limit, alpha = settings
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    ups, downs = up_proj.unbind(), down_proj.unbind()
    token_of_row = pair_of_row // weights.shape[1]
    scale = weights.flatten()[pair_of_row].to(x.dtype)[:, None]

    sum_dtype = _sum_dtype(x)
    grad_x = torch.zeros_like(x, dtype=sum_dtype) if need_x else x.new_empty(0)
    grad_scale = scale.new_zeros(scale.shape[0], dtype=sum_dtype)
    grads = [
        _gradient_buffer(weight, offsets) if weight is not None and need else x.new_empty(0)
        for weight, need in zip(projections, needs[2:], strict=True)
    ]
    grad_up, grad_down, grad_up_bias, grad_down_bias = grads

    previous = -1
    for expert, rows in _chunks(offsets, x.dtype):
        is_first, previous = expert != previous, expert
        tokens, s = token_of_row[rows], scale[rows]
        g, own, h = grad.index_select(0, tokens), x.index_select(0, tokens), pre[rows]
        a = activate(h, activation, interleaved=interleaved, limit=limit, alpha=alpha)
        p = g @ downs[expert]
        if need_weights:
            grad_scale[rows] = torch.linalg.vecdot(p.to(sum_dtype), a.to(sum_dtype))
            if down_bias is not None:
                grad_scale[rows] += (g @ down_bias[expert]).to(sum_dtype)
        if need_down:
            _accumulate(grad_down[expert], g.T, a.mul_(s), is_first)
        if need_down_bias:
            _accumulate(grad_down_bias[expert][None], s.T, g, is_first)
        if not (need_x or need_up or need_up_bias):
            continue
        dh = activate_backward(h, p.mul_(s), activation, interleaved, limit, alpha)
        if need_up:
            _accumulate(grad_up[expert], dh.T, own, is_first)
        if need_up_bias:
            _accumulate(grad_up_bias[expert][None], torch.ones_like(s).T, dh, is_first)
        if need_x:
            grad_x.index_add_(0, tokens, (dh @ ups[expert]).to(sum_dtype))

    grad_weights = (
        torch.empty_like(grad_scale).scatter_(0, pair_of_row, grad_scale).view_as(weights).to(weights.dtype)
    )
    return (grad_x.to(x.dtype), grad_weights if need_weights else x.new_empty(0), *grads)


def allocate(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor with the dtype and device of `like`, from huge pages where that pays."""
    bytes_needed = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or bytes_needed < _HUGE_PAGE_BYTES:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return torch.from_numpy(np.empty(bytes_needed, np.uint8)).view(like.dtype).view(tuple(shape))


def _gradient_buffer(weight: Tensor, offsets: Tensor) -> Tensor:
    """A tensor shaped and strided like weight (e ...), zero for the experts that own no rows, else uninitialised."""
    order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    buffer = allocate([weight.shape[axis] for axis in order], weight)
    buffer = buffer.permute([order.index(axis) for axis in range(weight.dim())])
    for expert, rows in enumerate(offsets.diff().tolist()):
        if not rows:
            buffer[expert].zero_()
    return buffer


def _chunks(offsets: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice]]:
    """(expert, rows) over the experts that own rows. 16-bit dtypes stay whole: their sums belong in one product."""
    bounds = offsets.tolist()
    step = CHUNK if dtype in (torch.float32, torch.float64) else max(bounds[-1], 1)
    for expert, (first, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        for start in range(first, end, step):
            yield expert, slice(start, min(start + step, end))


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """rows (r i) @ weight (i o) + bias (o)."""
    if bias is None:
        return torch.mm(rows, weight) if out is None else torch.mm(rows, weight, out=out)
    return torch.addmm(bias, rows, weight) if out is None else torch.addmm(bias, rows, weight, out=out)


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _accumulate(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """total = left @ right for an expert's first chunk, total += left @ right for the others."""
    torch.addmm(total, left, right, beta=0 if is_first else 1, out=total)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (p o) = rows (p i) @ weight (e i o) of the expert that owns each row; 0 where nobody does."""
    weights = weight.unbind()
    for expert, own in _chunks(offsets, rows.dtype):
        _linear(rows[own], weights[expert], _row(bias, expert), out[own])
    out[int(offsets[-1]) :].zero_()


def grouped_linear_weight_grads(
    grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight (e o i) and bias (e o), given grad (p o) and rows (p i)."""
    grad_weight = _gradient_buffer(weight, offsets)
    grad_bias = grad.new_zeros(weight.shape[:2])
    previous = -1
    for expert, own in _chunks(offsets, rows.dtype):
        _accumulate(grad_weight[expert], grad[own].T, rows[own], is_first=expert != previous)
        grad_bias[expert] += grad[own].sum(0)
        previous = expert
    return grad_weight, grad_bias
