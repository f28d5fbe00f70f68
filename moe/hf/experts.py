"""The function that transformers calls in place of an expert module's own forward.

It is imported by `register`, for it needs transformers. What a module looks like is read from the attributes
that transformers' decorator `use_experts_implementation` has set on it.
"""

from typing import Any, NamedTuple

import torch
from einops import reduce
from torch import Tensor, nn
from transformers.activations import GELUActivation, ReLUSquaredActivation, SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from moe.autocast import autocast_dtype
from moe.config import Activation
from moe.ops import pytorch
from moe.ops.choose import Backend, Ops, choose_ops
from moe.ops.experts_loop import Nonlinearity, Projections

# What an act_fn makes of the default gate, and of experts without one. Compared by type: a subclass may
# compute anything. GELUTanh is not our gelu, which is the exact one.
GATED: dict[type, Activation] = {SiLUActivation: "swiglu", nn.SiLU: "swiglu", GELUActivation: "geglu"}
UNGATED: dict[type, Activation] = {ReLUSquaredActivation: "relu2", GELUActivation: "gelu"}


class ClampedGate(NamedTuple):
    """A family's own gate that computes `clamped_swiglu`, and the attributes that hold its two numbers."""

    interleaved: bool
    limit: str
    alpha: str


# By the place where the gate is defined: the gate of a subclass, or of a copy, is another one.
CLAMPED_GATES = {
    ("gpt_oss", "GptOssExperts"): ClampedGate(True, "limit", "alpha"),
    ("openai_privacy_filter", "OpenAIPrivacyFilterExperts"): ClampedGate(False, "limit", "alpha"),
    ("minimax_m3_vl", "MiniMaxM3VLExperts"): ClampedGate(False, "swiglu_limit", "swiglu_alpha"),
}
PLACES = {
    (f"transformers.models.{family}.modeling_{family}", f"{name}._apply_gate"): gate
    for (family, name), gate in CLAMPED_GATES.items()
}


def experts_forward(
    self: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """hidden_states (t d), top_k_index (t k), top_k_weights (t k) -> (t d), in the dtype of hidden_states.

    An id outside 0..e-1, as expert parallelism gives to the pairs of other processes, runs nowhere: it adds
    nothing, whatever its weight, and its weight gets no gradient. Weights are read once and used through
    views. Products run in the dtype of the weights, or in that of autocast.

    Raises:
        ValueError: weights in a dtype without arithmetic, or shapes that do not fit together.
        RuntimeError: the requested backend cannot run here.
    """
    projections = read_projections(self, hidden_states.device)
    x = hidden_states.to(projections.up.dtype)
    ops = choose_ops(x.device, backend, x.dtype)
    nonlinearity = recognise(self)
    if nonlinearity is None:
        y = _step_by_step(self, ops, x, top_k_index, top_k_weights, projections)
    else:
        y = _fused(ops, x, top_k_index, top_k_weights, projections, nonlinearity)
    return y.to(hidden_states.dtype)


def read_projections(experts: Any, device: torch.device) -> Projections:
    """The four tensors as (e o i) and (e o), each attribute read once: PEFT computes some of them there.

    Raises:
        ValueError: weights that are stored in a dtype without arithmetic.
    """
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    up, down = getattr(experts, name), experts.down_proj
    up_bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    down_bias = experts.down_proj_bias if experts.has_bias else None
    if not up.dtype.is_floating_point or up.dtype.itemsize < 2:
        raise ValueError(
            f"{type(experts).__name__}.{name} is stored as {up.dtype}, in which nothing is computed. "
            f"Load the model dequantised, or keep the experts that transformers chose for it."
        )
    if (dtype := autocast_dtype(device)) is not None and up.dtype != torch.float64:  # as autocast has it
        up, down = up.to(dtype), down.to(dtype)
        up_bias = None if up_bias is None else up_bias.to(dtype)
        down_bias = None if down_bias is None else down_bias.to(dtype)
    if experts.is_transposed:
        up, down = up.mT, down.mT
    return Projections(up, down, up_bias, down_bias)


def recognise(experts: Any) -> Nonlinearity | None:
    """The activation of ours that this module computes between its products; None where only it knows.

    Layout follows the gate, not `is_concatenated`: it is the gate that transformers' own experts call.
    """
    if getattr(experts, "has_post_expert_norm", False):
        return None
    if not experts.has_gate:
        return _plain(experts, UNGATED)
    gate = getattr(experts._apply_gate, "__func__", None)
    if gate is _default_apply_gate:
        return _plain(experts, GATED)
    if gate is None or hasattr(gate, "__wrapped__"):
        return None
    clamped = PLACES.get((gate.__module__, gate.__qualname__))
    if clamped is None:
        return None
    limit, alpha = getattr(experts, clamped.limit), getattr(experts, clamped.alpha)
    if not (isinstance(limit, int | float) and isinstance(alpha, int | float)):
        return None
    return Nonlinearity("clamped_swiglu", clamped.interleaved, float(limit), float(alpha))


def _plain(experts: Any, table: dict[type, Activation]) -> Nonlinearity | None:
    """The entry for its act_fn; None also where hooks wait for act_fn to be called."""
    act = experts.act_fn
    activation = table.get(type(act))
    if activation is None or act._forward_hooks or act._forward_pre_hooks or act._backward_hooks:
        return None
    return Nonlinearity(activation, interleaved=False, limit=0.0, alpha=0.0)


def _fused(
    ops: Ops, x: Tensor, experts: Tensor, weights: Tensor, projections: Projections, how: Nonlinearity
) -> Tensor:
    if ops is pytorch and pytorch.is_few(x, weights, projections):
        return pytorch.experts_ffn_few(x, weights, experts, projections, how)
    plan = ops.sort_by_expert(experts, projections.down.shape[0])
    return ops.experts_ffn(
        x,
        weights,
        *plan,
        *projections,
        activation=how.activation,
        interleaved=how.interleaved,
        limit=how.limit,
        alpha=how.alpha,
    )


def _step_by_step(
    module: Any, ops: Ops, x: Tensor, experts: Tensor, weights: Tensor, projections: Projections
) -> Tensor:
    """The same products with the module's own gate, activation and norm between them."""
    up, down, up_bias, down_bias = projections
    pair_of_row, row_of_pair, offsets = ops.sort_by_expert(experts, down.shape[0])
    rows = ops.dispatch(x, pair_of_row, row_of_pair, weights.shape[1])
    pre = ops.grouped_linear(rows, up, offsets, up_bias)
    hidden = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
    outputs = ops.grouped_linear(hidden.to(x.dtype), down, offsets, down_bias)
    if getattr(module, "has_post_expert_norm", False):
        outputs = module.post_expert_norm(outputs)
    is_kept = torch.arange(len(pair_of_row), device=x.device) < offsets[-1]
    scale = torch.where(is_kept, weights.flatten()[pair_of_row], 0)[:, None]
    # Multiplied, then summed, as transformers does it: a fused multiply-add would round once less.
    return reduce((outputs * scale)[row_of_pair], "(t k) d -> t d", "sum", k=weights.shape[1])
