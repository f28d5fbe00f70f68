"""The experts' non-linearities and their derivatives with few passes over memory.

Reference: moe.ops.reference.activate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import Activation
from moe.ops.checks import check_activation


def activate(
    pre: Tensor,
    activation: Activation,
    *,
    interleaved: bool = False,
    limit: float = 7.0,
    alpha: float = 1.702,
) -> Tensor:
    """pre (... 2h), or (... h) without a gate -> (... h). Reference: moe.ops.reference.activate."""
    check_activation(activation)
    if activation == "relu2":
        return F.relu(pre).square()
    if activation == "gelu":
        return F.gelu(pre)
    gate, up = split_gate(pre, interleaved)
    if activation == "swiglu":
        return F.silu(gate) * up
    if activation == "geglu":
        return F.gelu(gate) * up
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


def activate_into(
    out: Tensor, pre: Tensor, activation: Activation, interleaved: bool, limit: float, alpha: float
) -> Tensor:
    """`activate` without autograd, written into out (... h)."""
    if activation != "swiglu":
        return out.copy_(activate(pre, activation, interleaved=interleaved, limit=limit, alpha=alpha))
    gate, up = split_gate(pre, interleaved)
    return torch.ops.aten.silu.out(gate, out=out).mul_(up)


def activate_backward_into(
    grad_pre: Tensor,
    pre: Tensor,
    grad: Tensor,
    activation: Activation,
    interleaved: bool,
    limit: float,
    alpha: float,
) -> Tensor:
    """Gradient of `activate` with respect to pre, given grad (... h), written into grad_pre."""
    if activation == "relu2":
        return torch.mul(F.relu(pre), grad, out=grad_pre).mul_(2)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(grad, pre, grad_input=grad_pre)
    gate, up = split_gate(pre, interleaved)
    grad_gate, grad_up = split_gate(grad_pre, interleaved)
    if activation == "swiglu":
        torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    elif activation == "geglu":
        torch.mul(F.gelu(gate), grad, out=grad_up)
        torch.ops.aten.gelu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    else:
        capped, clamped = gate.clamp(max=limit), up.clamp(-limit, limit)
        sigmoid = torch.sigmoid(alpha * capped)
        grad_up.copy_(grad * capped * sigmoid * (up.abs() <= limit))
        slope = sigmoid * (1 + alpha * capped * (1 - sigmoid))
        grad_gate.copy_(grad * (clamped + 1) * slope * (gate <= limit))
    return grad_pre


def split_gate(pre: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of gate and up (... h) inside pre (... 2h)."""
    if interleaved:
        return pre[..., ::2], pre[..., 1::2]
    gate, up = pre.chunk(2, dim=-1)
    return gate, up
