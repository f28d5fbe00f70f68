"""Level 1: tokens into the rows of their pairs, and rows summed into tokens."""

import torch
from torch import Tensor

from .checks import require_device, require_integers, require_rank, require_shape
from .direct import direct
from .launch import is_plain, is_unwatched
from .rows import combine_grads, gather_rows, sum_rows


def dispatch(x: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
    """Copy tokens x (t d) into the rows of their pairs -> (p d). Reference: moe.ops.reference.dispatch.

    Raises:
        ValueError: shapes or devices that do not fit together, or a plan that holds no integers.
    """
    require_rank("x", x, "t d")
    require_shape("pair_of_row", pair_of_row, (x.shape[0] * top_k,))
    require_shape("row_of_pair", row_of_pair, pair_of_row.shape)
    require_integers(x, pair_of_row=pair_of_row, row_of_pair=row_of_pair)
    pair_of_row, row_of_pair = pair_of_row.contiguous(), row_of_pair.contiguous()
    if is_plain(x):
        return _gather(x, pair_of_row, top_k)
    return (_dispatch_direct if is_unwatched(x) else _dispatch)(x, pair_of_row, row_of_pair, top_k)


def combine(rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sum of a token's rows (p d), weights (t k) -> (t d). Reference: moe.ops.reference.combine.

    Rows offsets[e] and above add nothing, whatever they hold. Sums are in float32, in slot order.

    Raises:
        ValueError: shapes or devices that do not fit together, or a plan that holds no integers.
    """
    require_rank("rows", rows, "p d")
    require_rank("weights", weights, "t k")
    require_shape("row_of_pair", row_of_pair, (weights.numel(),))
    require_shape("rows", rows, (weights.numel(), rows.shape[1]))
    require_rank("offsets", offsets, "e+1")
    require_device(rows, "rows", weights=weights)
    require_integers(rows, "rows", row_of_pair=row_of_pair, offsets=offsets)
    row_of_pair = row_of_pair.contiguous()
    if is_plain(rows, weights):
        return _sum(rows, weights, row_of_pair, offsets)
    return (_combine_direct if is_unwatched(rows, weights) else _combine)(rows, weights, row_of_pair, offsets)


def _gather(x: Tensor, pair_of_row: Tensor, top_k: int) -> Tensor:
    return gather_rows(x if x.stride(1) == 1 else x.contiguous(), pair_of_row, top_k)


def _sum(rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor) -> Tensor:
    return sum_rows(rows.contiguous(), row_of_pair, offsets, weights.shape[1], weights.contiguous())


@torch.library.custom_op("moe_triton::dispatch", mutates_args=())
def _dispatch(x: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
    return _gather(x, pair_of_row, top_k)


@_dispatch.register_fake
def _(x: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
    return x.new_empty(pair_of_row.shape[0], x.shape[1])


def _dispatch_setup(ctx, inputs, output) -> None:
    _, _, row_of_pair, ctx.top_k = inputs
    ctx.save_for_backward(row_of_pair)


def _dispatch_grad(grad: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
    return sum_rows(grad.contiguous(), row_of_pair, None, top_k, None)


_dispatch_backward = torch.library.custom_op("moe_triton::dispatch_backward", _dispatch_grad, mutates_args=())


@_dispatch_backward.register_fake
def _(grad: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
    return grad.new_empty(row_of_pair.shape[0] // top_k, grad.shape[1])


def _dispatch_autograd(ctx, grad: Tensor, backward=_dispatch_backward):
    return backward(grad, *ctx.saved_tensors, ctx.top_k), None, None, None


_dispatch.register_autograd(_dispatch_autograd, setup_context=_dispatch_setup)
_dispatch_direct = direct(
    lambda x, pair_of_row, _, top_k: _gather(x, pair_of_row, top_k),
    _dispatch_setup, _dispatch_autograd, _dispatch_backward, _dispatch_grad,
)  # fmt: skip


@torch.library.custom_op("moe_triton::combine", mutates_args=())
def _combine(rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor) -> Tensor:
    return _sum(rows, weights, row_of_pair, offsets)


@_combine.register_fake
def _(rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


def _combine_grads(
    grad: Tensor, rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    pair_of_row = torch.empty_like(row_of_pair)
    pair_of_row[row_of_pair] = torch.arange(row_of_pair.shape[0], device=row_of_pair.device)
    return combine_grads(grad.contiguous(), rows.contiguous(), weights.contiguous(), pair_of_row, offsets)


_combine_backward = torch.library.custom_op("moe_triton::combine_backward", _combine_grads, mutates_args=())


@_combine_backward.register_fake
def _(grad: Tensor, rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor):
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _combine_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _combine_autograd(ctx, grad: Tensor, backward=_combine_backward):
    return *backward(grad, *ctx.saved_tensors), None, None


_combine.register_autograd(_combine_autograd, setup_context=_combine_setup)
_combine_direct = direct(_sum, _combine_setup, _combine_autograd, _combine_backward, _combine_grads)
