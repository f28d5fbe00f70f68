"""Level 1: rows times the weight of the expert that owns them, and the two gradients of that product."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .autocast import cast_to_autocast
from .checks import check_grad_weight, check_grouped_linear, require_rank
from .config import Config, Pass, choose_config
from .direct import direct
from .experts_ffn import empty_like_weight, in_rows
from .grad_weight import grad_weight
from .launch import is_plain, is_unwatched, target_of
from .linear import linear
from .replay import replayed
from .rows import expert_sums, zero_rest
from .tiles import Plan


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (p i), weight (e o i) in any strides, bias (e o) -> (p o).

    Reference: moe.ops.reference.grouped_linear.

    Rows offsets[e] and above belong to nobody and come out as 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    rows, weight, bias = cast_to_autocast(rows, weight, bias)
    check_grouped_linear(rows, weight, offsets, bias)
    offsets = offsets.contiguous()
    if is_plain(rows, weight, bias):
        return _product("down", rows, weight, offsets, bias)
    return (_direct if is_unwatched(rows, weight, bias) else _grouped_linear)(rows, weight, offsets, bias)


def grouped_linear_grad_rows(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of the rows: grad (p o), weight (e o i) -> (p i); rows of nobody get 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    require_rank("weight", weight, "e o i")
    check_grouped_linear(grad, weight.mT, offsets)
    offsets = offsets.contiguous()
    if _is_called_directly(grad, weight):
        return _product("grad_rows", grad, weight.mT, offsets, None)
    return _grouped_linear_grad_rows(grad, weight, offsets)


def grouped_linear_grad_weight(
    grad: Tensor, rows: Tensor, offsets: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Gradient of the weight: grad (p o), rows (p i) -> (e o i); an expert without rows gets 0.

    out (e o i), of any floating dtype and strides, is added to and returned: a main gradient in float32 takes
    the sum over micro-batches without a copy in between.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check_grad_weight(grad, rows, offsets, out)
    offsets = offsets.contiguous()
    is_direct = _is_called_directly(grad, rows, out)
    if out is not None:
        (_add_grad_weight if is_direct else _grouped_linear_add_grad_weight)(grad, rows, offsets, out)
        return out
    return (_grad_weight if is_direct else _grouped_linear_grad_weight)(grad, rows, offsets)


def _is_called_directly(*tensors: Tensor | None) -> bool:
    """Gradients are asked for by name, also where a mode looks at every call of an operator."""
    return is_plain(*tensors) and not is_in_torch_dispatch_mode()


@replayed()
def _product(what: Pass, rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    rows = in_rows(rows)
    y = linear(rows, weight, bias, _plan(rows, offsets), _config(what, rows, *weight.shape))
    zero_rest(y, offsets)
    return y


def _grad_weight(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    out = grad.new_empty(offsets.shape[0] - 1, grad.shape[1], rows.shape[1])
    _write_grad_weight(grad, rows, offsets, out, accumulate=False)
    return out


def _add_grad_weight(grad: Tensor, rows: Tensor, offsets: Tensor, out: Tensor) -> None:
    _write_grad_weight(grad, rows, offsets, out, accumulate=True)


def _write_grad_weight(grad: Tensor, rows: Tensor, offsets: Tensor, out: Tensor, *, accumulate: bool) -> None:
    grad, rows = in_rows(grad), in_rows(rows)
    config = _config("grad_up", rows, *out.shape)
    grad_weight(grad, rows, out, _plan(grad, offsets), config, accumulate=accumulate)


def _plan(rows: Tensor, offsets: Tensor) -> Plan:
    """Level 1 gathers nothing: a plan of rows that are where they should be."""
    return Plan(rows[:, :1], rows[:, :1], offsets, 1, {})


def _config(what: Pass, rows: Tensor, num_experts: int, outputs: int, inputs: int) -> Config:
    """The schedule of the same pass of a whole layer, but whole: its parts are added in `combine`."""
    config = choose_config(
        what, target_of(rows.device), rows.dtype, rows.shape[0], num_experts, outputs, inputs
    )
    return config.whole()


@torch.library.custom_op("moe_triton::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return _product("down", rows, weight, offsets, bias)


@_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _grads(
    grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias; empty where not needed."""
    none, (needs_rows, needs_weight, needs_bias) = [rows.new_empty(0) for _ in range(3)], needs
    grad, of_rows, of_weight, of_bias = in_rows(grad), *none
    if needs_rows:
        of_rows = _product("grad_rows", grad, weight.mT, offsets, None)
    if needs_weight:
        of_weight = empty_like_weight(weight)
        _write_grad_weight(grad, rows, offsets, of_weight, accumulate=False)
    if needs_bias:
        of_bias = expert_sums(grad, offsets, None, 1, None, dtype=rows.dtype)
    return of_rows, of_weight, of_bias


_backward = torch.library.custom_op("moe_triton::grouped_linear_backward", _grads, mutates_args=())


@_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, needs: list[bool]):
    needs_rows, needs_weight, needs_bias = needs
    return (
        rows.new_empty(rows.shape if needs_rows else 0),
        empty_like_weight(weight) if needs_weight else rows.new_empty(0),
        rows.new_empty(weight.shape[:2] if needs_bias else 0),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _autograd(ctx, grad: Tensor, backward=_backward):
    rows, weight, offsets = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = backward(grad, rows, weight, offsets, needs)
    of_rows, of_weight, of_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return of_rows, of_weight, None, of_bias


_grouped_linear.register_autograd(_autograd, setup_context=_setup)
_direct = direct(
    lambda rows, weight, offsets, bias: _product("down", rows, weight, offsets, bias),
    _setup, _autograd, _backward, _grads,
)  # fmt: skip


# The gradients by name: no gradient of a gradient is offered.


@torch.library.custom_op("moe_triton::grouped_linear_grad_rows", mutates_args=())
def _grouped_linear_grad_rows(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return _product("grad_rows", grad, weight.mT, offsets, None)


@_grouped_linear_grad_rows.register_fake
def _(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[2])


@torch.library.custom_op("moe_triton::grouped_linear_grad_weight", mutates_args=())
def _grouped_linear_grad_weight(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    return _grad_weight(grad, rows, offsets)


@_grouped_linear_grad_weight.register_fake
def _(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, grad.shape[1], rows.shape[1])


@torch.library.custom_op("moe_triton::grouped_linear_add_grad_weight", mutates_args=("out",))
def _grouped_linear_add_grad_weight(grad: Tensor, rows: Tensor, offsets: Tensor, out: Tensor) -> None:
    _add_grad_weight(grad, rows, offsets, out)


@_grouped_linear_add_grad_weight.register_fake
def _(grad: Tensor, rows: Tensor, offsets: Tensor, out: Tensor) -> None:
    return None
