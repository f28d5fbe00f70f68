"""Who is timed on a GPU: ours, what torch and transformers bring, and two packages of Triton kernels.

Every candidate maps the tensors of a `Problem` to y (t d), from the chosen experts on: none has a router, and
all but "ours, sorted" sort inside the time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from benchmarks.gpu_problem import Problem
from benchmarks.shapes import Shape

OURS = "ours"
OURS_SORTED = "ours, sorted"
DENSE = "dense"
GROUPED_MM = "grouped_mm"
COMPILED = "grouped_mm compiled"
TRANSFORMERS = "hf grouped_mm"
LIGER = "liger-kernel"
MOE_OPS = "moe-ops"
TORCH_ONLY = (GROUPED_MM, COMPILED, TRANSFORMERS)
EVERYONE_ELSE = (*TORCH_ONLY, LIGER, MOE_OPS)
# Seconds that a candidate takes to tune itself to a shape, compiled ahead or not: estimates.
TUNING_S = {LIGER: (45.0, 340.0), MOE_OPS: (25.0, 100.0), COMPILED: (12.0, 45.0)}
# Modules whose autotuners compile many schedules of every kernel.
TUNED_MODULES = {
    LIGER: ("liger_kernel.ops.fused_moe_kernels",),
    MOE_OPS: ("moe_ops.grouped_gemm_ops", "moe_ops.grouped_gemm_ops_sm90", "moe_ops.unpermute_ops"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """`run` maps a problem to y (t d); `graph` is None if a CUDA graph can hold it, or why it cannot."""

    name: str
    run: Callable[[Problem], Tensor]
    graph: str | None = None


def make(name: str, shape: Shape) -> Candidate:
    """One candidate by name."""
    return MAKERS[name](shape)


def why_absent(name: str, shape: Shape) -> str | None:
    """Which package is missing, or which experts it does not do; None for a candidate that can be made."""
    if name in (LIGER, MOE_OPS) and shape.gpt_oss:
        return "has no biases and no clamped SwiGLU"
    for package, names in PACKAGES.items():
        if name in names and find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed"
    return None


def _ours(shape: Shape) -> Candidate:
    import moe_triton

    def run(problem: Problem) -> Tensor:
        return _run_ours(problem, moe_triton.sort_by_expert(problem.experts, problem.shape.e))

    return Candidate(OURS, run)


def _ours_sorted(shape: Shape) -> Candidate:
    def run(problem: Problem) -> Tensor:
        plan = problem.plan
        return _run_ours(problem, (plan.pair_of_row, plan.row_of_pair, plan.offsets))

    return Candidate(OURS_SORTED, run)


def _run_ours(problem: Problem, plan: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    import moe_triton

    x, _, weights, *projections = _tensors(problem)
    return moe_triton.experts_ffn(
        x, weights, *plan, *projections, activation=problem.activation, interleaved=problem.shape.gpt_oss
    )


def compose(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """What one writes with torch alone: sort, gather, grouped_mm, activation, grouped_mm, weighted sum."""
    k, e = experts.shape[1], up_proj.shape[0]
    expert_of_row, pair_of_row = torch.sort(rearrange(experts, "t k -> (t k)"))
    ends = torch.searchsorted(expert_of_row, torch.arange(e, device=x.device), right=True).to(torch.int32)
    pre = F.grouped_mm(x.index_select(0, pair_of_row // k), up_proj.mT, offs=ends)
    if up_bias is None:
        gate, up = pre.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        pre = pre + up_bias.index_select(0, expert_of_row)
        gate, up = pre[..., ::2].clamp(max=7.0), pre[..., 1::2].clamp(-7.0, 7.0)
        hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    rows = F.grouped_mm(hidden, down_proj.mT, offs=ends)
    rows = rows if down_bias is None else rows + down_bias.index_select(0, expert_of_row)
    row_of_pair = torch.empty_like(pair_of_row)
    row_of_pair = row_of_pair.scatter(0, pair_of_row, torch.arange(len(pair_of_row), device=x.device))
    weighted = rows.index_select(0, row_of_pair) * rearrange(weights, "t k -> (t k) 1")
    return reduce(weighted, "(t k) d -> t d", "sum", k=k)


def _grouped_mm(shape: Shape) -> Candidate:
    return Candidate(GROUPED_MM, lambda problem: compose(*_tensors(problem)))


def _compiled(shape: Shape) -> Candidate:
    torch.compiler.reset()  # every size would count against the limit of recompilations of one function
    compiled = torch.compile(compose, dynamic=False)
    return Candidate(COMPILED, lambda problem: compiled(*_tensors(problem)))


def _tensors(problem: Problem) -> tuple[Any, ...]:
    projections = (problem.up_proj, problem.down_proj, problem.up_bias, problem.down_bias)
    return problem.x, problem.experts, problem.weights, *projections


def _transformers(shape: Shape) -> Candidate:
    """The experts of Qwen3-MoE or gpt-oss as transformers runs them by default, on our tensors."""
    experts: Any = _gpt_oss_experts(shape) if shape.gpt_oss else _qwen3_experts(shape)
    experts.config._experts_implementation = "grouped_mm"
    for name in list(dict(experts.named_parameters(recurse=False))):
        delattr(experts, name)  # plain tensors take their place

    def run(problem: Problem) -> Tensor:
        transposed = problem.shape.gpt_oss
        experts.gate_up_proj = problem.up_proj.mT if transposed else problem.up_proj
        experts.down_proj = problem.down_proj.mT if transposed else problem.down_proj
        experts.gate_up_proj_bias, experts.down_proj_bias = problem.up_bias, problem.down_bias
        return experts(problem.x, problem.experts, problem.weights)

    return Candidate(TRANSFORMERS, run)


def _qwen3_experts(shape: Shape) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.d,
        moe_intermediate_size=shape.h,
        num_experts=shape.e,
        num_experts_per_tok=shape.k,
        hidden_act="silu",
    )
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def _gpt_oss_experts(shape: Shape) -> nn.Module:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=shape.d,
        intermediate_size=shape.h,
        num_local_experts=shape.e,
        num_experts_per_tok=shape.k,
    )
    with torch.device("meta"):
        return GptOssExperts(config)


def _liger(shape: Shape) -> Candidate:
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def run(problem: Problem) -> Tensor:
        experts = problem.experts.to(torch.int32)
        return function.apply(problem.x, problem.up_proj, problem.down_proj, experts, problem.weights)

    return Candidate(LIGER, run, graph="reads the number of tiles on the host")


def _moe_ops(shape: Shape) -> Candidate:
    moe_ops = import_module("moe_ops")

    def run(problem: Problem) -> Tensor:
        (t, k), e = problem.experts.shape, problem.shape.e
        rows, row_id_map, offsets = moe_ops.permute(problem.x, problem.experts.to(torch.int32), t * k, e)
        gate, up = moe_ops.grouped_gemm(rows, problem.up_proj, offsets).chunk(2, dim=-1)
        rows = moe_ops.grouped_gemm(F.silu(gate) * up, problem.down_proj, offsets)
        return moe_ops.unpermute(rows, row_id_map, problem.weights, t, k)

    return Candidate(MOE_OPS, run)


MAKERS: dict[str, Callable[[Shape], Candidate]] = {
    OURS: _ours,
    OURS_SORTED: _ours_sorted,
    GROUPED_MM: _grouped_mm,
    COMPILED: _compiled,
    TRANSFORMERS: _transformers,
    LIGER: _liger,
    MOE_OPS: _moe_ops,
}
PACKAGES = {
    "moe_triton": (OURS, OURS_SORTED),
    "transformers": (TRANSFORMERS,),
    "liger_kernel": (LIGER,),
    "moe_ops": (MOE_OPS,),
}


class DenseProducts:
    """The matrix products of one expert that gets all p rows: what cuBLAS makes of the same operations.

    Nothing but the products: two forward, two for each of them backward.
    """

    def __init__(self, shape: Shape, pairs: int, device: torch.device, dtype: torch.dtype) -> None:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device, dtype=dtype)

        d, h = shape.d, shape.h
        self.rows, self.pre, self.hidden = normal(pairs, d), normal(pairs, 2 * h), normal(pairs, h)
        self.up_proj, self.down_proj = normal(2 * h, d), normal(d, h)

    def work(self, *, backward: bool) -> Callable[[], object]:
        """The products as a call without arguments; y and its gradient are as good as `rows`."""

        def run() -> list[Tensor]:
            products = [self.rows @ self.up_proj.T, self.hidden @ self.down_proj.T]
            if backward:
                products.append(self.rows @ self.down_proj)
                products.append(self.rows.T @ self.hidden)
                products.append(self.pre @ self.up_proj)
                products.append(self.pre.T @ self.rows)
            return products

        return run
