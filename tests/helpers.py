"""What several tests share: a tolerance that is a comparison, named awkward routings, and a definition.

The definition runs in loops over tokens, so that no test takes its truth from the code under test.

Axes: t tokens, k choices, p = t k pairs, e experts, d model width, h expert width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from types import ModuleType
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import Activation, MoEConfig
from moe.plan import RoutingPlan

ACTIVATIONS: tuple[str, ...] = get_args(Activation)
GATED = ("swiglu", "geglu", "clamped_swiglu")
LIMIT, ALPHA = 0.8, 1.3  # unlike the defaults, so that forgetting to pass them on shows
LEAVES = ("x", "weights", "up_proj", "down_proj", "up_bias", "down_bias")


def assert_as_accurate(
    ours: Tensor,
    torch_same_dtype: Tensor,
    truth: Tensor,
    factor: float = 2.0,
    ulps: float = 1.0,
    name: str = "",
) -> None:
    """Ours errs at most `factor` times as much as torch in the same dtype, plus `ulps`.

    NaN fails.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if ours.numel() == 0:
        return
    error = (ours.double() - truth).abs().max()
    floor = ulps * torch.finfo(ours.dtype).eps * truth.abs().max()
    allowed = factor * (torch_same_dtype.double() - truth).abs().max() + floor
    assert error <= allowed, (
        f"{name}: error {error:.2e} is over {allowed:.2e} ({factor} x torch's own, plus {ulps} ulp)"
    )


def assert_same(ours: Tensor, truth: Tensor, name: str = "", tolerance: float = 1e-11) -> None:
    """Equal in float64 up to the order of summation; NaN fails."""
    torch.testing.assert_close(
        ours.double(), truth.double(), rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


# Routings


def random_experts(
    tokens: int, top_k: int, num_experts: int, seed: int = 0, among: Iterable[int] | None = None
) -> Tensor:
    """experts (t k): distinct within a token, drawn from `among` (all of them by default)."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(list(range(num_experts) if among is None else among))
    order = torch.rand(tokens, len(allowed), generator=generator).argsort(dim=1)
    return allowed[order[:, :top_k]]


def drop(
    experts: Tensor, num_experts: int, *, tokens: Iterable[int] = (), pairs: Iterable[tuple[int, int]] = ()
) -> Tensor:
    """A copy of experts (t k) in which whole tokens, or single (token, choice) pairs, go to no expert."""
    experts = experts.clone()
    for token in tokens:
        experts[token] = num_experts
    for token, choice in pairs:
        experts[token, choice] = num_experts
    return experts


AWKWARD_ROUTINGS: dict[str, tuple[Tensor, int]] = {
    "no tokens": (torch.empty(0, 2, dtype=torch.int64), 4),
    "one token": (random_experts(1, 2, 4), 4),
    "one token of many experts": (random_experts(1, 3, 16), 16),
    "empty experts": (random_experts(9, 2, 8, among=(1, 4, 5)), 8),
    "first and last expert empty": (random_experts(9, 2, 5, among=(1, 2, 3)), 5),
    "one expert takes all": (torch.full((7, 1), 2), 4),
    "the last expert takes all": (torch.full((7, 1), 3), 4),
    "one expert": (torch.zeros(5, 1, dtype=torch.int64), 1),
    "every expert chosen": (random_experts(5, 4, 4), 4),
    "an expert chosen twice by one token": (torch.tensor([[1, 1, 0], [2, 0, 2], [3, 3, 3]]), 4),
    "odd sizes": (random_experts(13, 3, 7), 7),
    "one row per expert": (torch.arange(6)[:, None], 6),
    "some pairs dropped": (drop(random_experts(9, 2, 4), 4, tokens=(0, 4, 8), pairs=((1, 0), (2, 1))), 4),
    "all pairs dropped": (torch.full((3, 2), 4), 4),
}


# Problems


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that experts_ffn takes, for one routing."""

    experts: Tensor  # (t k); num_experts marks a dropped pair
    num_experts: int
    x: Tensor  # (t d)
    weights: Tensor  # (t k)
    up_proj: Tensor  # (e 2h d), or (e h d) without a gate
    down_proj: Tensor  # (e d h)
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str = "swiglu"
    interleaved: bool = False
    weights_on_input: bool = False

    @property
    def plan(self) -> RoutingPlan:
        return RoutingPlan.from_experts(self.experts, self.num_experts)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in LEAVES if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype) -> "Problem":
        return replace(self, **{name: leaf.to(dtype) for name, leaf in self.leaves.items()})

    def on(self, device: torch.device | str) -> "Problem":
        leaves = {name: leaf.to(device) for name, leaf in self.leaves.items()}
        return replace(self, experts=self.experts.to(device), **leaves)


def make_problem(
    experts: Tensor,
    num_experts: int,
    d: int = 6,
    h: int = 5,
    *,
    activation: str = "swiglu",
    interleaved: bool = False,
    weights_on_input: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Random tensors around a routing. The weights of dropped pairs are 0, as the router makes them."""
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    up = 2 * h if activation in GATED else h
    weights = torch.rand(experts.shape, generator=generator, dtype=torch.float64) + 0.1
    kept = (experts >= 0) & (experts < num_experts)
    problem = Problem(
        experts,
        num_experts,
        x=randn(experts.shape[0], d),
        weights=weights * kept,
        up_proj=randn(num_experts, up, d) / d**0.5,
        down_proj=randn(num_experts, d, h) / h**0.5,
        up_bias=randn(num_experts, up) / 2 if bias else None,
        down_bias=randn(num_experts, d) / 2 if bias else None,
        activation=activation,
        interleaved=interleaved,
        weights_on_input=weights_on_input,
    )
    return problem.to(dtype)


Apply = Callable[..., Tensor]


def activate_by_hand(
    pre: Tensor, activation: str, interleaved: bool = False, limit: float = LIMIT, alpha: float = ALPHA
):
    """pre (... 2h), or (... h) without a gate -> (... h)."""
    if activation == "relu2":
        return F.relu(pre) ** 2
    if activation == "gelu":
        return F.gelu(pre)
    gate, up = (pre[..., ::2], pre[..., 1::2]) if interleaved else pre.chunk(2, dim=-1)
    if activation == "swiglu":
        return F.silu(gate) * up
    if activation == "geglu":
        return F.gelu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def by_loops(problem: Problem, x, weights, up_proj, down_proj, up_bias=None, down_bias=None) -> Tensor:
    """y[t] = sum over its choices of weight * expert(x[t]), one token and one choice at a time.

    With weights_on_input: of expert(weight * x[t]).
    """
    outputs = []
    for token, chosen in enumerate(problem.experts.tolist()):
        y = x.new_zeros(x.shape[1])
        for choice, expert in enumerate(chosen):
            if not 0 <= expert < problem.num_experts:
                continue
            weight = weights[token, choice].to(x.dtype)
            before, after = (weight, 1) if problem.weights_on_input else (1, weight)
            pre = up_proj[expert] @ (before * x[token]) + (0 if up_bias is None else up_bias[expert])
            hidden = activate_by_hand(pre, problem.activation, problem.interleaved)
            out = down_proj[expert] @ hidden + (0 if down_bias is None else down_bias[expert])
            y = y + after * out
        outputs.append(y)
    return torch.stack(outputs) if outputs else x[:0]


def one_expert_at_a_time(
    problem: Problem, x, weights, up_proj, down_proj, up_bias=None, down_bias=None
) -> Tensor:
    """What a user of torch writes: gather each expert's tokens, run it, add its weighted outputs back."""
    y = torch.zeros_like(x)
    for expert in range(problem.num_experts):
        token, choice = (problem.experts == expert).nonzero(as_tuple=True)
        weight = weights[token, choice, None].to(x.dtype)
        before, after = (weight, 1) if problem.weights_on_input else (1, weight)
        pre = F.linear(before * x[token], up_proj[expert], None if up_bias is None else up_bias[expert])
        hidden = activate_by_hand(pre, problem.activation, problem.interleaved)
        out = F.linear(hidden, down_proj[expert], None if down_bias is None else down_bias[expert])
        y = y.index_add(0, token, after * out)
    return y


def by_ops(ops: ModuleType, **options) -> Apply:
    """experts_ffn of a backend, as a function of a problem and its leaves."""

    def apply(problem: Problem, x, weights, up_proj, down_proj, up_bias=None, down_bias=None) -> Tensor:
        plan = problem.plan
        return ops.experts_ffn(
            x,
            weights,
            plan.pair_of_row,
            plan.row_of_pair,
            plan.offsets,
            up_proj,
            down_proj,
            up_bias,
            down_bias,
            activation=problem.activation,
            interleaved=problem.interleaved,
            limit=LIMIT,
            alpha=ALPHA,
            weights_on_input=problem.weights_on_input,
            **options,
        )

    return apply


def by_composition(ops: ModuleType) -> Apply:
    """The level 1 operations of a backend, one after the other."""

    def apply(problem: Problem, x, weights, up_proj, down_proj, up_bias=None, down_bias=None) -> Tensor:
        plan = problem.plan
        rows = ops.dispatch(x, plan.pair_of_row, plan.row_of_pair, plan.top_k)
        if problem.weights_on_input:
            is_kept = torch.arange(len(rows), device=x.device)[:, None] < plan.offsets[-1]
            rows = torch.where(is_kept, rows, 0) * weights.to(x.dtype).flatten()[plan.pair_of_row, None]
            weights = torch.ones_like(weights)
        pre = ops.grouped_linear(rows, up_proj, plan.offsets, up_bias)
        hidden = ops.activate(
            pre, problem.activation, interleaved=problem.interleaved, limit=LIMIT, alpha=ALPHA
        )
        out = ops.grouped_linear(hidden, down_proj, plan.offsets, down_bias)
        return ops.combine(out, weights, plan.row_of_pair, plan.offsets)

    return apply


def solve(
    apply: Apply, problem: Problem, upstream: Tensor | None = None, wanted: Iterable[str] = LEAVES
) -> dict[str, Tensor]:
    """The value "y" and the gradient of each wanted leaf under a random (or the given) incoming gradient."""
    wanted = [name for name in problem.leaves if name in wanted]
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in problem.leaves.items()}
    y = apply(problem, **leaves)
    if not y.requires_grad:
        return {"y": y} | {name: torch.zeros_like(leaves[name]) for name in wanted}
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [leaves[name] for name in wanted]
    grads = torch.autograd.grad(y, inputs, upstream.to(y), allow_unused=True, materialize_grads=True)
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))


def assert_solutions_agree(
    ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-11
) -> None:
    """Float64: the value and every gradient."""
    assert ours.keys() == truth.keys()
    for name in truth:
        assert_same(ours[name], truth[name], name, tolerance)


# Layouts and mistakes


def stored_transposed(tensor: Tensor) -> Tensor:
    """The same numbers as a view of memory in which the last two axes are swapped."""
    return tensor.mT.contiguous().mT


def spread(tensor: Tensor) -> Tensor:
    """The same numbers as a view of every other number of a row."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


# What does not fit make_problem(random_experts(5, 2, 4), 4) in float32, and what the message names.
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "x of another width": ({"x": torch.randn(5, 7)}, r"x .*7.*6"),
    "x of another dtype": ({"x": torch.randn(5, 6).bfloat16()}, r"(?s)float32.*bfloat16|bfloat16.*float32"),
    "x on another device": (
        {"x": torch.randn(5, 6, device="meta")},
        r"(?s)meta.*(cpu|cuda)|(cpu|cuda).*meta",
    ),
    "weights on another device": ({"weights": torch.rand(5, 2, device="meta")}, r"(?s)weights.*meta"),
    "up_proj without its gate": ({"up_proj": torch.randn(4, 5, 6)}, r"up_proj.*5.*10"),
    "down_bias of another width": ({"down_bias": torch.randn(4, 5)}, r"down_bias.*5.*6"),
}


# Layers


def tiny_config(**changes) -> MoEConfig:
    """A layer small enough for every test; spread-out logits, so that rounding does not change a choice."""
    sizes = {
        "hidden_size": 12,
        "moe_intermediate_size": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "initializer_range": 0.5,
    }
    return MoEConfig(**(sizes | changes))


def fill(module: torch.nn.Module, seed: int = 0, std: float = 0.4) -> torch.nn.Module:
    """Random parameters, biases too, so that no gradient or bias is zero by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return module


def bytes_allocated(work: Callable[[], object]) -> int:
    """Bytes that the CPU allocator hands out while `work` runs, freed or not, inside custom operators too."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator has handed out and not got back at any moment of `work`."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(changes)))
