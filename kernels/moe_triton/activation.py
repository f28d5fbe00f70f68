"""The non-linearities of the experts: on tiles, for the kernels, and as an operation of their own.

Reference: moe.ops.reference.activate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .direct import direct
from .launch import ceil_div, is_plain, is_unwatched, launch

GATED = ("swiglu", "geglu", "clamped_swiglu")
ACTIVATIONS = (*GATED, "relu2", "gelu")


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def normal_cdf(x):
    """Probability that a standard normal variable is below x; gelu(x) is x times that."""
    return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def at_least(x, bound):
    """x, or the bound where that is larger. NaN stays NaN: a run that has gone wrong must not look well."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, bound):
    """x, or the bound where that is smaller. NaN stays NaN."""
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activated(gate, up, limit, alpha, ACTIVATION: tl.constexpr):
    """hidden = act(gate) * up in float32; without a gate act(gate), and up is not looked at."""
    if ACTIVATION == "swiglu":
        return gate * sigmoid(gate) * up
    elif ACTIVATION == "geglu":
        return gate * normal_cdf(gate) * up
    elif ACTIVATION == "clamped_swiglu":
        gate = at_most(gate, limit)
        return gate * sigmoid(alpha * gate) * (at_most(at_least(up, -limit), limit) + 1)
    elif ACTIVATION == "relu2":
        gate = at_least(gate, 0.0)
        return gate * gate
    else:
        return gate * normal_cdf(gate)


@triton.jit
def activation_grads(gate, up, grad, limit, alpha, ACTIVATION: tl.constexpr):
    """(hidden, gradient of gate, gradient of up), given the gradient of hidden; all in float32.

    A clamp passes no gradient where it changed the value. Without a gate the gradient of up is 0.
    """
    if ACTIVATION == "swiglu":
        share = sigmoid(gate)
        act = gate * share
        slope = share * (1 + gate - act)
    elif ACTIVATION == "clamped_swiglu":
        capped = at_most(gate, limit)
        share = sigmoid(alpha * capped)
        act = capped * share
        slope = tl.where(gate <= limit, share * (1 + alpha * (capped - act)), 0.0)
    elif ACTIVATION == "relu2":
        act = at_least(gate, 0.0)
        slope = 2 * act
        act = act * act
    else:
        share = normal_cdf(gate)
        act = gate * share
        slope = share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    if ACTIVATION == "swiglu" or ACTIVATION == "geglu":
        return act * up, grad * up * slope, grad * act
    elif ACTIVATION == "clamped_swiglu":
        kept = at_most(at_least(up, -limit), limit) + 1
        inside = (up >= -limit) & (up <= limit)
        return act * kept, grad * kept * slope, tl.where(inside, grad * act, 0.0)
    else:
        return act, grad * slope, tl.zeros_like(grad)


@triton.jit
def activate_kernel(
    pre_ptr, grad_ptr, out_ptr, N, H, limit, alpha,
    ACTIVATION: tl.constexpr, GATED_PRE: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Hidden number n stands in row n // H. Forward writes hidden (n), backward the gradient of pre."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_number = n < N
    if GATED_PRE:
        row, column = n // H, n % H
        gate_at = row * 2 * H + (2 * column if INTERLEAVED else column)
        up_at = gate_at + (1 if INTERLEAVED else H)
    else:
        gate_at, up_at = n, n
    gate = tl.load(pre_ptr + gate_at, mask=is_number, other=0.0).to(tl.float32)
    up = tl.load(pre_ptr + up_at, mask=is_number, other=0.0).to(tl.float32)
    element = out_ptr.dtype.element_ty
    if BACKWARD:
        grad = tl.load(grad_ptr + n, mask=is_number, other=0.0).to(tl.float32)
        _, grad_gate, grad_up = activation_grads(gate, up, grad, limit, alpha, ACTIVATION)
        tl.store(out_ptr + gate_at, grad_gate.to(element), mask=is_number)
        if GATED_PRE:
            tl.store(out_ptr + up_at, grad_up.to(element), mask=is_number)
    else:
        tl.store(out_ptr + n, activated(gate, up, limit, alpha, ACTIVATION).to(element), mask=is_number)


def activate(
    pre: Tensor, activation: str, *, interleaved: bool = False, limit: float = 7.0, alpha: float = 1.702
) -> Tensor:
    """pre (... 2h), or (... h) without a gate -> (... h). Reference: moe.ops.reference.activate.

    Raises:
        ValueError: an unknown activation.
    """
    check_activation(activation)
    arguments = (activation, interleaved, float(limit), float(alpha))
    if is_plain(pre):
        return _forward(pre, *arguments)
    return (_activate_direct if is_unwatched(pre) else _activate)(pre, *arguments)


def check_activation(activation: str) -> None:
    """Raise ValueError unless this is the name of an activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {list(ACTIVATIONS)}.")


def _forward(pre: Tensor, activation: str, interleaved: bool, limit: float, alpha: float) -> Tensor:
    hidden = pre.new_empty(_hidden_shape(pre, activation))
    _launch(pre.contiguous(), None, hidden, hidden.numel(), activation, interleaved, limit, alpha)
    return hidden


def _hidden_shape(pre: Tensor, activation: str):
    return (*pre.shape[:-1], pre.shape[-1] // 2 if activation in GATED else pre.shape[-1])


def _launch(
    pre: Tensor,
    grad: Tensor | None,
    out: Tensor,
    numbers: int,
    activation: str,
    interleaved: bool,
    limit: float,
    alpha: float,
) -> None:
    is_gated, block = activation in GATED, 1024
    arguments = {
        "pre_ptr": pre,
        "grad_ptr": pre if grad is None else grad,
        "out_ptr": out,
        "N": numbers,
        "H": pre.shape[-1] // (2 if is_gated else 1),
        "limit": limit,
        "alpha": alpha,
        "ACTIVATION": activation,
        "GATED_PRE": is_gated,
        "INTERLEAVED": interleaved,
        "BACKWARD": grad is not None,
        "BLOCK": block,
    }
    launch(activate_kernel, (ceil_div(numbers, block),), arguments)


@torch.library.custom_op("moe_triton::activate", mutates_args=())
def _activate(pre: Tensor, activation: str, interleaved: bool, limit: float, alpha: float) -> Tensor:
    return _forward(pre, activation, interleaved, limit, alpha)


@_activate.register_fake
def _(pre: Tensor, activation: str, *settings) -> Tensor:
    return pre.new_empty(_hidden_shape(pre, activation))


def _activate_grad(
    grad: Tensor, pre: Tensor, activation: str, interleaved: bool, limit: float, alpha: float
) -> Tensor:
    of_pre = pre.new_empty(pre.shape)
    grad = grad.contiguous()
    _launch(pre.contiguous(), grad, of_pre, grad.numel(), activation, interleaved, limit, alpha)
    return of_pre


_activate_backward = torch.library.custom_op("moe_triton::activate_backward", _activate_grad, mutates_args=())


@_activate_backward.register_fake
def _(grad: Tensor, pre: Tensor, *settings) -> Tensor:
    return pre.new_empty(pre.shape)


def _setup(ctx, inputs, output) -> None:
    pre, *ctx.settings = inputs
    ctx.save_for_backward(pre)


def _autograd(ctx, grad: Tensor, backward=_activate_backward):
    return backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_activate.register_autograd(_autograd, setup_context=_setup)
_activate_direct = direct(_forward, _setup, _autograd, _activate_backward, _activate_grad)
