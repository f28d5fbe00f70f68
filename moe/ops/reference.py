"""The specification of every operation: short, slow, obviously right, differentiable; float64 works.

`moe_definition` is what a MoE layer means. The other functions are the sorted form that fast backends follow;
`experts_ffn` composes them.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

from moe.config import GATED_ACTIVATIONS, Activation
from moe.ops.checks import check_activation, check_experts_ffn, refuse_batch_invariant


def moe_definition(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
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
) -> Tensor:
    """y[t] = sum over the choices j of weights[t, j] * expert_{experts[t, j]}(x[t]).

    x (t d), experts (t k), weights (t k), up_proj (e 2h d), or (e h d) without a gate, down_proj (e d h),
    up_bias (e 2h), down_bias (e d) -> (t d). Ids outside 0..e-1 count for nothing.

    weights_on_input: y[t] = sum over the choices j of expert_{experts[t, j]}(weights[t, j] * x[t]) (Llama 4).
    """
    if weights_on_input:  # each choice is a token of its own, scaled beforehand, whose one weight is 1
        choices = rearrange(weights.to(x.dtype)[..., None] * x[:, None], "t k d -> (t k) d")
        one_choice = rearrange(experts, "t k -> (t k) 1")
        y = moe_definition(
            choices,
            one_choice,
            torch.ones_like(one_choice, dtype=x.dtype),
            up_proj,
            down_proj,
            up_bias,
            down_bias,
            activation=activation,
            interleaved=interleaved,
            limit=limit,
            alpha=alpha,
        )
        return reduce(y, "(t k) d -> t d", "sum", k=weights.shape[1])
    pre = einsum(x, up_proj, "t d, e o d -> t e o")
    pre = pre if up_bias is None else pre + up_bias
    hidden = activate(pre, activation, interleaved=interleaved, limit=limit, alpha=alpha)
    outputs = einsum(hidden, down_proj, "t e h, e d h -> t e d")
    outputs = outputs if down_bias is None else outputs + down_bias
    chosen = experts[..., None] == torch.arange(up_proj.shape[0], device=x.device)  # (t k e)
    gates = (weights[..., None] * chosen).sum(1).to(outputs.dtype)
    outputs = outputs.masked_fill(~chosen.any(1)[..., None], 0)  # 0 * NaN is NaN
    return einsum(gates, outputs, "t e, t e d -> t d")


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the pairs of experts (t k), stably: pair_of_row (p), row_of_pair (p), offsets (e+1).

    An id outside 0..num_experts-1 marks a pair that no expert runs; those come last, in their own order.
    """
    pairs = rearrange(experts, "t k -> (t k)").long()
    pairs = pairs.clamp(-1, num_experts).remainder(num_experts + 1)  # every other id becomes num_experts
    expert_of_row, pair_of_row = torch.sort(pairs, stable=True)
    row_of_pair = torch.empty_like(pair_of_row)
    row_of_pair.scatter_(0, pair_of_row, torch.arange(pairs.numel(), device=pairs.device))
    offsets = torch.searchsorted(expert_of_row, torch.arange(num_experts + 1, device=pairs.device))
    return pair_of_row, row_of_pair, offsets


def dispatch(x: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
    """Copy tokens x (t d) into the rows of their pairs -> (p d)."""
    return x[pair_of_row // top_k]


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (p i), weight (e o i), bias (e o) -> (p o): each row meets the expert that owns it.

    Rows offsets[e] and above belong to nobody and come out as 0.
    """
    kept = int(offsets[-1])
    outputs = [
        own @ weight[i].T if bias is None else own @ weight[i].T + bias[i]
        for i, own in enumerate(rows[:kept].split(offsets.diff().tolist()))
    ]
    return torch.cat([*outputs, rows.new_zeros(rows.shape[0] - kept, weight.shape[1])])


def activate(
    pre: Tensor,
    activation: Activation,
    *,
    interleaved: bool = False,
    limit: float = 7.0,
    alpha: float = 1.702,
) -> Tensor:
    """The expert's non-linearity.

    pre (... 2h) -> (... h) for gated activations: gate first then up, or g0 u0 g1 u1 ... when interleaved;
    pre (... h) -> (... h) otherwise.

    swiglu: silu(gate) * up (2002.05202); geglu: gelu(gate) * up; clamped_swiglu: gate capped at `limit`, up
    to ±`limit`, gate * sigmoid(alpha * gate) * (up + 1) (gpt-oss); relu2: relu(pre)² (2109.08668); gelu:
    the exact one.
    """
    check_activation(activation)
    if activation not in GATED_ACTIVATIONS:
        return F.relu(pre).square() if activation == "relu2" else F.gelu(pre)
    pattern = "... (h two) -> two ... h" if interleaved else "... (two h) -> two ... h"
    gate, up = rearrange(pre, pattern, two=2)
    if activation == "swiglu":
        return gate * torch.sigmoid(gate) * up
    if activation == "geglu":
        return F.gelu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def combine(rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sum of the rows of each token, in slot order: rows (p d), weights (t k) -> (t d).

    Rows offsets[e] and above add nothing, whatever they hold.
    """
    pairs = rows[row_of_pair].masked_fill((row_of_pair >= offsets[-1])[:, None], 0)
    pairs = rearrange(pairs, "(t k) d -> t k d", k=weights.shape[1])
    return einsum(pairs, weights.to(pairs.dtype), "t k d, t k -> t d")


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
    """The routed experts of a layer: dispatch, up-projection, activation, down-projection, combine.

    x (t d), weights (t k), the three tensors of a `RoutingPlan`, up_proj (e 2h d), or (e h d) without a gate,
    down_proj (e d h), up_bias (e 2h), down_bias (e d) -> (t d). Any strides.

    weights_on_input: a routing weight multiplies what its expert reads, and the outputs are summed as they
    are (Llama 4). batch_invariant: a token's output has the same bits whatever else is in the batch.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: batch_invariant, which only the Triton kernels can promise.
    """
    refuse_batch_invariant(batch_invariant)
    check_experts_ffn(
        x, weights, pair_of_row, row_of_pair, offsets, up_proj, down_proj, up_bias, down_bias, activation
    )
    rows = dispatch(x, pair_of_row, row_of_pair, weights.shape[1])
    if weights_on_input:
        is_kept = torch.arange(rows.shape[0], device=x.device) < offsets[-1]
        rows = rows.masked_fill(~is_kept[:, None], 0)  # else NaN there would reach the gradient of a weight
        rows = rows * weights.to(x.dtype).flatten()[pair_of_row, None]
        weights = torch.ones_like(weights)
    pre = grouped_linear(rows, up_proj, offsets, up_bias)
    hidden = activate(pre, activation, interleaved=interleaved, limit=limit, alpha=alpha)
    return combine(grouped_linear(hidden, down_proj, offsets, down_bias), weights, row_of_pair, offsets)


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    allowed: Tensor | None,
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """out[q] = sum over the keys k that q may see of exp(scale q·k) / z · values[k], z the sum of those exp.

    queries (b n s c), keys (b g l c), values (b g l c'), where n / g query heads in a row share a key head;
    allowed (b 1 s l) or (b n s l) bool, None for all -> (b n s c').

    sinks (n): exp(sink) of a head joins its z, so a query that sees no key gets 0. Without sinks such a query
    has no answer, and the output is NaN.
    """
    shared = queries.shape[1] // keys.shape[1]
    keys, values = (repeat(x, "b g l c -> b (g r) l c", r=shared) for x in (keys, values))
    scores = scale * einsum(queries, keys, "b n s c, b n l c -> b n s l")
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        sink = repeat(sinks, "n -> b n s 1", b=scores.shape[0], s=scores.shape[2])
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return einsum(weights, values, "b n s l, b n l c -> b n s c")
