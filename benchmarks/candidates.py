"""Whole layers to be timed side by side: all sparse ones share one router and one set of expert weights."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from benchmarks.shapes import Shape
from moe.layer import MoE
from moe.ops.choose import Backend, triton_obstacle

OURS = "ours"
DENSE = "dense"
GROUPED_MM = "grouped_mm"
HF_GROUPED = "hf grouped_mm"
HF_NAMES = {HF_GROUPED: "grouped_mm", "hf eager": "eager", "hf batched_mm": "batched_mm"}

LOGIT_STD = 1.28  # of a standard Gumbel variable


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A layer under test: `run` maps x (t d) to y (t d), `parameters` are what it is differentiated for.

    `layer` is the sparse layer whose mathematics it claims to compute; None for the dense feed-forward.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    layer: MoE | None


class DenseFFN(nn.Module):
    """SwiGLU of the same active FLOPs, from three nn.Linear: what a sparse layer is held against."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (t d) -> (t d)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def make_layer(shape: Shape, *, zipf: bool, backend: Backend = "torch", seed: int = 0) -> MoE:
    """A sparse layer whose load is near balance, or skewed.

    Router logits of a unit-variance input have standard deviation LOGIT_STD. Balanced: no bias. Skewed: the
    router's bias is log(1 / rank), ranks in random order: were the logits Gumbel variables, choosing the k
    largest would draw k experts without replacement with Zipf's probabilities (Gumbel top-k, 1903.06059).
    """
    torch.manual_seed(seed)
    layer = MoE(shape.config(), backend=backend)
    bias = layer.router.bias
    assert bias is not None  # Shape.config asks for one, so that both loads cost the router the same
    with torch.no_grad():
        layer.router.weight.normal_(std=LOGIT_STD / shape.d**0.5)
        for weight in (layer.experts.get_parameter("gate_up_proj"), layer.experts.down_proj):
            weight.normal_(std=weight.shape[-1] ** -0.5)
        if zipf:
            bias.copy_(-(1.0 + torch.randperm(shape.e)).log())
    return layer


def make_candidates(layer: MoE, shape: Shape) -> list[Candidate]:
    """Everything that can run here on the device and in the dtype of `layer`."""
    weight = layer.router.weight
    dense = DenseFFN(shape.d, shape.dense_width).to(weight.device, weight.dtype)
    candidates = [
        Candidate(DENSE, dense, list(dense.parameters()), None),
        Candidate(OURS, lambda x: layer(x).y, list(layer.parameters()), layer),
    ]
    if triton_obstacle(weight.device) is None:
        candidates.append(_other_backend(layer, shape, "triton"))
    if hasattr(F, "grouped_mm"):
        candidates.append(Candidate(GROUPED_MM, _grouped_mm_layer(layer), list(layer.parameters()), layer))
    if find_spec("transformers") is not None:
        candidates += [_transformers(name, layer, shape) for name in HF_NAMES]
    return candidates


def _other_backend(layer: MoE, shape: Shape, backend: Backend) -> Candidate:
    other = MoE(shape.config(), backend=backend)
    other.router, other.experts.gate_up_proj, other.experts.down_proj = (
        layer.router,
        layer.experts.get_parameter("gate_up_proj"),
        layer.experts.down_proj,
    )
    return Candidate(f"ours, {backend}", lambda x: other(x).y, list(layer.parameters()), layer)


def _grouped_mm_layer(layer: MoE) -> Callable[[Tensor], Tensor]:
    """What one writes with torch alone: sort, gather, grouped_mm, SwiGLU, grouped_mm, weighted sum."""
    up_proj, down_proj = layer.experts.get_parameter("gate_up_proj"), layer.experts.down_proj

    def run(x: Tensor) -> Tensor:
        routing = layer.router(x)
        k, e = routing.top_k, routing.num_experts
        pairs = rearrange(routing.experts, "t k -> (t k)")
        pair_of_row = pairs.argsort()
        ends = pairs.bincount(minlength=e).cumsum(0, dtype=torch.int32)
        rows = x.index_select(0, pair_of_row // k)
        gate, up = F.grouped_mm(rows, up_proj.mT, offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, down_proj.mT, offs=ends)
        weighted = rows.index_select(0, pair_of_row.argsort()) * rearrange(
            routing.weights.to(x.dtype), "t k -> (t k) 1"
        )
        return reduce(weighted, "(t k) d -> t d", "sum", k=k)

    return run


def _transformers(name: str, layer: MoE, shape: Shape) -> Candidate:
    """Qwen3-MoE's experts in one of transformers' own implementations, behind our router, on our weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.d,
        moe_intermediate_size=shape.h,
        num_experts=shape.e,
        num_experts_per_tok=shape.k,
        hidden_act="silu",
    )
    config._experts_implementation = HF_NAMES[name]
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = layer.experts.get_parameter("gate_up_proj")
    experts.down_proj = layer.experts.down_proj

    def run(x: Tensor) -> Tensor:
        routing = layer.router(x)
        return experts(x, routing.experts, routing.weights.to(x.dtype))

    return Candidate(name, run, list(layer.parameters()), layer)


def why_not(name: str, shape: Shape, tokens: int, *, backward: bool, item_bytes: int) -> str | None:
    """Why a candidate is not run at this size, or None. Predicted, so that nobody waits or swaps to find out.

    hf batched_mm copies its expert's weights for every pair: 3 d h numbers each, three times with backward.
    hf eager slices every expert out of the stack; on the way back each slice makes a gradient of the whole
    stack, zeros but for itself, and adds it up: e * (experts hit) * 3 d h numbers at about SLICE_BYTES_S.
    """
    expert_bytes = shape.expert_numbers * item_bytes
    hit = min(shape.e, tokens * shape.k)
    if name == "hf batched_mm":
        copied = tokens * shape.k * expert_bytes * (3 if backward else 1)
        if copied > COPY_LIMIT_BYTES:
            return f"copies {copied / 1e9:.0f} GB of weights"
    if name == "hf eager" and backward:
        seconds = hit * shape.e * expert_bytes / SLICE_BYTES_S
        if seconds > EAGER_LIMIT_S:
            return f"would take about {seconds:.0f} s a run"
    return None


COPY_LIMIT_BYTES = 2e9
SLICE_BYTES_S = 1.7e9  # measured on two CPU cores
EAGER_LIMIT_S = 20.0
