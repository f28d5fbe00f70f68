"""The routed experts of a layer, forward and backward: level 2.

Forward: up-projection with gather and activation, down-projection, combine. Backward: gradient of the
pre-activation, of W_down, of the tokens, of W_up, in the order in which each finds its operands in the cache.
For the backward x (t d) and the pre-activation (p 2h) are kept, nothing else of their size.
"""

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from .autocast import cast_to_autocast
from .checks import check_experts_ffn
from .config import Pass, choose_config
from .direct import is_last
from .grad_pre import grad_pre
from .grad_weight import grad_weight
from .launch import is_plain, is_unwatched, needs_grad, target_of
from .linear import linear
from .replay import replayed
from .rows import expert_sums, gather_rows, row_dots, sum_rows, weight_grads
from .settings import Settings
from .tiles import Plan
from .up import up


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
    activation: str = "swiglu",
    interleaved: bool = False,
    limit: float = 7.0,
    alpha: float = 1.702,
    weights_on_input: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """The routed experts of a layer, x (t d) -> (t d). Reference: moe.ops.reference.experts_ffn.

    weights (t k); pair_of_row (p), row_of_pair (p), offsets (e+1) from `sort_by_expert`; up_proj (e 2h d), or
    (e h d) without a gate; down_proj (e d h); up_bias (e 2h); down_bias (e d). Projections in any strides.
    bfloat16, float16 or float32; under torch.autocast all but the routing weights are cast to its dtype.

    weights_on_input: the routing weight multiplies x, not the output (Llama 4).
    batch_invariant: one schedule for every number of tokens, so that a token's output has the same bits
    whatever else is in the batch.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or an unknown activation.
    """
    x, up_proj, down_proj, up_bias, down_bias = cast_to_autocast(x, up_proj, down_proj, up_bias, down_bias)
    settings = Settings(
        activation, interleaved, float(limit), float(alpha), weights_on_input, batch_invariant
    )
    plan = (pair_of_row.contiguous(), row_of_pair.contiguous(), offsets.contiguous())
    projections = (up_proj, down_proj, up_bias, down_bias)
    leaves = (x, weights, *projections)
    if is_plain(*leaves):
        return forward(x, weights, *plan, *projections, settings, keep_pre=False)[0]
    if is_unwatched(*leaves):
        return _Direct.apply(x, weights, *plan, *projections, settings)
    check_experts_ffn(x, weights, *plan, *projections, settings)
    y, _ = _experts_ffn(x, weights, *plan, *projections, *astuple(settings), needs_grad(*leaves))
    return y


@replayed(check_experts_ffn)
def forward(
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    row_of_pair: Tensor,
    offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    settings: Settings,
    *,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    """y (t d) and, with keep_pre, the pre-activation, by kernels alone: below autograd and the dispatcher."""
    plan = Plan(pair_of_row, row_of_pair, offsets, weights.shape[1], {})
    x, weights = in_rows(x), weights.contiguous()
    on_input, on_output = (weights, None) if settings.weights_on_input else (None, weights)
    hidden, pre = up(x, up_proj, up_bias, on_input, plan, settings, keep_pre=keep_pre)
    rows = linear(hidden, down_proj, down_bias, plan, _config("down", x, down_proj, plan, settings))
    del hidden
    return sum_rows(rows, row_of_pair, offsets, plan.top_k, on_output, dtype=x.dtype), pre


@replayed()
def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    row_of_pair: Tensor,
    offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    settings: Settings,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, up_proj, down_proj, up_bias, down_bias; None where not needed."""
    needs_x, needs_weights, needs_up, needs_down, needs_up_bias, needs_down_bias = needs
    plan = Plan(pair_of_row, row_of_pair, offsets, weights.shape[1], {})
    grad, x, scale = in_rows(grad), in_rows(x), weights.contiguous()
    on_input, on_output = (scale, None) if settings.weights_on_input else (None, scale)
    of_x = of_weights = of_up = of_down = of_up_bias = of_down_bias = None
    if any(needs[:5]):
        of_pre, hidden, parts = grad_pre(grad, down_proj, pre, on_output, plan, settings)
        if needs_down:
            of_down = empty_like_weight(down_proj)
            config = _config("grad_down", x, down_proj, plan, settings)
            grad_weight(grad, hidden, of_down, plan, config, gather_a=True)
        del hidden
        if parts is not None and needs_weights:
            of_weights = weight_grads(parts, pair_of_row, offsets, weights, grad, down_bias)
        if needs_x or (needs_weights and settings.weights_on_input):
            rows = linear(
                of_pre, up_proj.mT, None, plan, _config("grad_rows", x, down_proj, plan, settings).whole()
            )
            if needs_x:
                of_x = sum_rows(rows, row_of_pair, offsets, plan.top_k, on_input, dtype=x.dtype)
            if needs_weights and settings.weights_on_input:
                of_weights = row_dots(rows, x, pair_of_row, offsets, weights)
            del rows
        if needs_up:
            of_up = empty_like_weight(up_proj)
            config = _config("grad_up", x, down_proj, plan, settings)
            met = x if on_input is None else gather_rows(x, pair_of_row, plan.top_k, on_input)
            grad_weight(of_pre, met, of_up, plan, config, gather_b=on_input is None)
        if needs_up_bias:
            of_up_bias = expert_sums(of_pre, offsets, None, plan.top_k, None, dtype=x.dtype)
    if needs_down_bias:
        of_down_bias = expert_sums(grad, offsets, pair_of_row, plan.top_k, on_output, dtype=x.dtype)
    return of_x, of_weights, of_up, of_down, of_up_bias, of_down_bias


def _config(what: Pass, x: Tensor, down_proj: Tensor, plan: Plan, settings: Settings):
    num_experts, d, h = down_proj.shape
    return choose_config(
        what, target_of(x.device), x.dtype, plan.pairs, num_experts, d, h,
        batch_invariant=settings.batch_invariant,
    )  # fmt: skip


def in_rows(tensor: Tensor) -> Tensor:
    """A matrix whose rows are contiguous and do not share memory: itself, or a copy."""
    return tensor if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()


def empty_like_weight(weight: Tensor) -> Tensor:
    """Memory for a gradient, the last two axes in the order in which the weight has them."""
    if weight.stride(1) == 1 and weight.stride(2) != 1:
        return torch.empty_like(weight.mT, memory_format=torch.contiguous_format).mT
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


class _Direct(torch.autograd.Function):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Autograd and the kernels, nothing between (`direct`); the settings stay together."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, pre = forward(*inputs, keep_pre=True)
        *tensors, ctx.settings = inputs
        ctx.save_for_backward(*tensors, pre)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        if grad is None:
            return (None,) * 10
        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:9])
        if is_last(grad):
            grads = backward(in_rows(grad), *ctx.saved_tensors, settings=ctx.settings, needs=needs)
        else:
            grads = _experts_ffn_backward(grad, *ctx.saved_tensors, *astuple(ctx.settings), list(needs))
            grads = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        return *grads[:2], None, None, None, *grads[2:], None


# The operators that torch.compile, modes and torch.func see.


@torch.library.custom_op("moe_triton::experts_ffn", mutates_args=())
def _experts_ffn(
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    row_of_pair: Tensor,
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
    batch_invariant: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """(y, pre-activation); the second is empty unless keep_pre."""
    settings = Settings(activation, interleaved, limit, alpha, weights_on_input, batch_invariant)
    plan = (pair_of_row, row_of_pair, offsets)
    y, pre = forward(x, weights, *plan, up_proj, down_proj, up_bias, down_bias, settings, keep_pre=keep_pre)
    return y, x.new_empty(0, up_proj.shape[1]) if pre is None else pre


@_experts_ffn.register_fake
def _(x, weights, pair_of_row, row_of_pair, offsets, up_proj, *others):
    pairs = pair_of_row.shape[0] if others[-1] else 0
    return x.new_empty(x.shape), x.new_empty(pairs, up_proj.shape[1])


@torch.library.custom_op("moe_triton::experts_ffn_backward", mutates_args=())
def _experts_ffn_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    row_of_pair: Tensor,
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
    batch_invariant: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up_proj, down_proj, up_bias, down_bias; empty where not needed."""
    settings = Settings(activation, interleaved, limit, alpha, weights_on_input, batch_invariant)
    plan = (pair_of_row, row_of_pair, offsets)
    projections = (up_proj, down_proj, up_bias, down_bias)
    grads = backward(grad, x, weights, *plan, *projections, pre, settings, tuple(needs))
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # pyright: ignore[reportReturnType]


@_experts_ffn_backward.register_fake
def _(
    grad, x, weights, pair_of_row, row_of_pair, offsets, up_proj, down_proj, up_bias, down_bias, pre, *others
):
    needs = others[-1]
    grads = (
        x.new_empty(x.shape) if needs[0] else None,
        weights.new_empty(weights.shape) if needs[1] else None,
        empty_like_weight(up_proj) if needs[2] else None,
        empty_like_weight(down_proj) if needs[3] else None,
        up_bias.new_empty(up_bias.shape) if needs[4] else None,
        down_bias.new_empty(down_bias.shape) if needs[5] else None,
    )
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _setup(ctx, inputs, output) -> None:
    tensors, ctx.settings = inputs[:9], inputs[9:15]
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad: Tensor | None, _grad_pre: Tensor | None):
    if grad is None:
        return (None,) * 16
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 5, 6, 7, 8)]
    grads = _experts_ffn_backward(grad, *ctx.saved_tensors, *ctx.settings, needs)
    x, weights, up_proj, down_proj, up_bias, down_bias = (
        g if need else None for g, need in zip(grads, needs, strict=True)
    )
    return x, weights, None, None, None, up_proj, down_proj, up_bias, down_bias, *(None,) * 7


_experts_ffn.register_autograd(_autograd, setup_context=_setup)
