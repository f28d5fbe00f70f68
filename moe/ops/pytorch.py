"""The operations in plain torch, fast on a CPU and on any device without Triton.

Same names, same meaning as `moe.ops.reference`. What loops over experts, or has a backward of its own, is an
opaque custom operator, so that autograd, torch.compile(fullgraph=True) and autocast see one node.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from moe.config import Activation
from moe.ops import experts_loop
from moe.ops.activations import activate
from moe.ops.checks import check_experts_ffn, check_grouped_linear, check_weights, refuse_batch_invariant
from moe.ops.experts_loop import Nonlinearity, Projections
from moe.ops.reference import sort_by_expert

__all__ = ["activate", "combine", "dispatch", "experts_ffn", "grouped_linear", "sort_by_expert"]

FEW_PAIRS = 64  # up to here Python sorts them faster than torch does


def dispatch(x: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
    """Copy tokens x (t d) into the rows of their pairs -> (p d). Reference: moe.ops.reference.dispatch."""
    return _dispatch(x, pair_of_row, row_of_pair, top_k)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each row meets the expert that owns it: rows (p i), weight (e o i), bias (e o) -> (p o).

    Reference: moe.ops.reference.grouped_linear.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check_grouped_linear(rows, weight, offsets, bias)
    return _grouped_linear(rows, weight, offsets, bias)


def combine(rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sum of a token's rows (p d), weights (t k) -> (t d). Reference: moe.ops.reference.combine."""
    return _combine(rows, weights, row_of_pair, offsets)


def experts_ffn(
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    row_of_pair: Tensor,
    offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Activation = "swiglu",
    interleaved: bool = False,
    limit: float = 7.0,
    alpha: float = 1.702,
    weights_on_input: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """The routed experts of a layer, x (t d) -> (t d). Reference: moe.ops.reference.experts_ffn.

    Keeps x and the pre-activation (p 2h) for the backward, and nothing when no gradient is asked for.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: batch_invariant, which only the Triton kernels can promise.
    """
    refuse_batch_invariant(batch_invariant)
    check_experts_ffn(
        x, weights, pair_of_row, row_of_pair, offsets, up_proj, down_proj, up_bias, down_bias, activation
    )
    projections = Projections(up_proj, down_proj, up_bias, down_bias)
    keep_pre = needs_grad(x, weights, *projections)
    # An operator call costs 50 us, which a token being decoded would feel.
    if not keep_pre and type(x) is Tensor and not (x.is_meta or torch.compiler.is_compiling()):
        nonlinearity = Nonlinearity(activation, interleaved, limit, alpha)
        return experts_loop.forward(
            x, weights, pair_of_row, offsets, projections, nonlinearity, weights_on_input, pre=None
        )
    y, _ = _experts_ffn(
        x, weights, pair_of_row, offsets, up_proj, down_proj, up_bias, down_bias,
        activation, interleaved, limit, alpha, weights_on_input, keep_pre,
    )  # fmt: skip
    return y


def is_few(x: Tensor, weights: Tensor, projections: Projections) -> bool:
    """Whether `experts_ffn_few` can run: on a CPU, without gradients or a graph, for few pairs."""
    return (
        0 < weights.numel() <= FEW_PAIRS
        and type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not needs_grad(x, weights, *projections)
    )


def experts_ffn_few(
    x: Tensor, weights: Tensor, experts: Tensor, projections: Projections, nonlinearity: Nonlinearity
) -> Tensor:
    """`experts_ffn` of x (t d), weights (t k), experts (t k) -> (t d), where `is_few` allows it.

    A token being decoded feels every call: this makes none to sort the pairs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check_weights(x, weights, *projections, nonlinearity.activation)
    if experts.shape != weights.shape:
        raise ValueError(
            f"experts has shape {tuple(experts.shape)}, but weights has {tuple(weights.shape)}: "
            f"each choice needs one weight."
        )
    with torch.autocast("cpu", enabled=False):
        return experts_loop.forward_few(x, weights, experts, projections, nonlinearity)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# The operators. Their bodies run below autograd, and without autocast: the inputs have their final dtype.


@torch.library.custom_op("moe::dispatch", mutates_args=())
def _dispatch(x: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
    return x.index_select(0, pair_of_row // top_k)


@_dispatch.register_fake
def _(x: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
    return x.new_empty(pair_of_row.shape[0], x.shape[1])


def _dispatch_setup(ctx, inputs, output) -> None:
    _, _, row_of_pair, ctx.top_k = inputs
    ctx.save_for_backward(row_of_pair)


def _dispatch_backward(ctx, grad: Tensor):
    (row_of_pair,) = ctx.saved_tensors
    return _sum_rows(grad, rearrange(row_of_pair, "(t k) -> t k", k=ctx.top_k)), None, None, None


_dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)


@torch.library.custom_op("moe::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return experts_loop.grouped_linear(rows, weight.mT, offsets, bias)


@_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("moe::grouped_linear_backward", mutates_args=())
def _grouped_linear_grads(
    grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(rows.device.type, enabled=False):
        grad_rows = experts_loop.grouped_linear(grad, weight, offsets, None)
        grad_weight, grad_bias = experts_loop.grouped_linear_weight_grads(grad, rows, weight, offsets)
    return grad_rows, grad_weight, grad_bias if has_bias else grad.new_empty(0)


@_grouped_linear_grads.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool):
    grad_bias = grad.new_empty(weight.shape[:2] if has_bias else 0)
    return rows.new_empty(rows.shape), torch.empty_like(weight), grad_bias


def _grouped_linear_setup(ctx, inputs, output) -> None:
    rows, weight, offsets, bias = inputs
    ctx.save_for_backward(rows, weight, offsets)
    ctx.has_bias = bias is not None


def _grouped_linear_backward(ctx, grad: Tensor):
    grad_rows, grad_weight, grad_bias = _grouped_linear_grads(grad, *ctx.saved_tensors, ctx.has_bias)
    return grad_rows, grad_weight, None, grad_bias if ctx.has_bias else None


_grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_grouped_linear_setup)


@torch.library.custom_op("moe::combine", mutates_args=())
def _combine(rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor) -> Tensor:
    return _sum_rows(rows, row_of_pair.view_as(weights), weights.to(rows.dtype), int(offsets[-1]))


@_combine.register_fake
def _(rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


def _combine_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx, grad: Tensor):
    rows, weights, row_of_pair, offsets = ctx.saved_tensors
    is_dropped = row_of_pair >= offsets[-1]
    scale = weights.to(rows.dtype).flatten().masked_fill(is_dropped, 0)
    of_pair = scale[:, None] * grad.repeat_interleave(weights.shape[1], 0)  # (p d)
    grad_rows = torch.empty_like(of_pair).index_copy(0, row_of_pair, of_pair)
    pairs = rearrange(
        rows[row_of_pair].masked_fill(is_dropped[:, None], 0), "(t k) d -> t k d", k=weights.shape[1]
    )
    return grad_rows, torch.linalg.vecdot(pairs, grad[:, None]).to(weights.dtype), None, None


_combine.register_autograd(_combine_backward, setup_context=_combine_setup)


def _sum_rows(
    rows: Tensor, row_of_pair: Tensor, weights: Tensor | None = None, kept: int | None = None
) -> Tensor:
    """Sum over k of weights (t k) * rows[row_of_pair (t k)] -> (t d); rows from `kept` on are left out."""
    if row_of_pair.numel() == 0:
        return rows.new_zeros(row_of_pair.shape[0], rows.shape[1])
    left_out = None
    if kept is not None and kept < rows.shape[0]:  # dropped pairs point at the last row, which is left out
        left_out = rows.shape[0] - 1
        row_of_pair = row_of_pair.masked_fill(row_of_pair >= kept, left_out)
    return F.embedding_bag(
        row_of_pair, rows.contiguous(), per_sample_weights=weights, mode="sum", padding_idx=left_out
    )


@torch.library.custom_op("moe::experts_ffn", mutates_args=())
def _experts_ffn(
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    limit: float,
    alpha: float,
    weights_on_input: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """(y, pre-activation); the second is empty unless keep_pre."""
    projections = Projections(up_proj, down_proj, up_bias, down_bias)
    nonlinearity = Nonlinearity(cast(Activation, activation), interleaved, limit, alpha)
    pre = experts_loop.allocate((pair_of_row.shape[0] if keep_pre else 0, up_proj.shape[1]), x)
    kept = pre if keep_pre else None
    with torch.autocast(x.device.type, enabled=False):
        y = experts_loop.forward(
            x, weights, pair_of_row, offsets, projections, nonlinearity, weights_on_input, kept
        )
    pre[int(offsets[-1]) :].zero_()
    return y, pre


@_experts_ffn.register_fake
def _(x, weights, pair_of_row, offsets, up_proj, down_proj, up_bias, down_bias, *settings):
    keep_pre = settings[-1]
    return torch.empty_like(x), x.new_empty(pair_of_row.shape[0] if keep_pre else 0, up_proj.shape[1])


@torch.library.custom_op("moe::experts_ffn_backward", mutates_args=())
def _experts_ffn_grads(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    activation: str,
    interleaved: bool,
    limit: float,
    alpha: float,
    weights_on_input: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up_proj, down_proj, up_bias, down_bias; empty where not needed."""
    projections = Projections(up_proj, down_proj, up_bias, down_bias)
    nonlinearity = Nonlinearity(cast(Activation, activation), interleaved, limit, alpha)
    with torch.autocast(x.device.type, enabled=False):
        return experts_loop.backward(
            grad, x, weights, pair_of_row, offsets, projections, nonlinearity, weights_on_input, pre, needs
        )


@_experts_ffn_grads.register_fake
def _(grad, x, weights, pair_of_row, offsets, up_proj, down_proj, up_bias, down_bias, pre, *settings):
    inputs = (x, weights, up_proj, down_proj, up_bias, down_bias)
    return tuple(
        torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, settings[-1], strict=True)
    )


def _experts_ffn_setup(ctx, inputs, output) -> None:
    tensors, ctx.settings = inputs[:8], inputs[8:13]
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _experts_ffn_backward(ctx, grad: Tensor | None, _grad_pre: Tensor | None):
    *tensors, pre = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4, 5, 6, 7)]
    if grad is None:
        return (None,) * 14
    grads = _experts_ffn_grads(grad, *tensors, pre, *ctx.settings, needs)
    x, weights, up, down, up_bias, down_bias = (
        g if need else None for g, need in zip(grads, needs, strict=True)
    )
    return x, weights, None, None, up, down, up_bias, down_bias, *(None,) * 6


_experts_ffn.register_autograd(_experts_ffn_backward, setup_context=_experts_ffn_setup)
