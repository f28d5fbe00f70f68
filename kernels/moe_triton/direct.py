"""Autograd and the kernels, nothing between: with few tokens an operator costs more than all its launches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .launch import is_unwatched


def direct(
    forward: Callable[..., Tensor],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    operator: Any,
    kernels: Callable[..., Any],
) -> Callable[..., Tensor]:
    """What the operator with this forward does, for calls that autograd alone sees.

    setup, backward: as registered with the operator; backward takes what computes the gradients as its last
    argument: the operator for them, or its kernels.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            return backward(ctx, *grad_outputs, kernels if is_last(*grad_outputs) else operator)

    return Direct.apply


def is_last(grad: Tensor) -> bool:
    """Whether kernels may compute a gradient: nobody asks for a gradient of that, which operators refuse."""
    return not torch.is_grad_enabled() and is_unwatched(grad)
