"""Problems made on the device, large enough to be real."""

from dataclasses import dataclass
from functools import partial

import torch
from accuracy import Solution
from device import DEVICE
from helpers import GATED, Problem, by_ops, drop, random_experts, solve
from torch import Tensor

import moe_triton


@dataclass(frozen=True)
class Sizes:
    tokens: int
    top_k: int
    num_experts: int
    d: int
    h: int
    activation: str = "swiglu"
    interleaved: bool = False
    bias: bool = False


def problem_on_gpu(sizes: Sizes, dtype: torch.dtype, experts: Tensor | None = None) -> Problem:
    """A random problem, made on the device; some tokens dropped unless the routing is given."""
    if experts is None:
        experts = random_experts(sizes.tokens, sizes.top_k, sizes.num_experts)
        experts = drop(experts, sizes.num_experts, tokens=range(0, sizes.tokens, 50))
    experts = experts.to(DEVICE)
    randn = partial(torch.randn, device=DEVICE, dtype=dtype, generator=torch.Generator(DEVICE).manual_seed(0))
    e, d, h = sizes.num_experts, sizes.d, sizes.h
    up = 2 * h if sizes.activation in GATED else h
    return Problem(
        experts,
        e,
        x=randn(experts.shape[0], d),
        weights=(randn(experts.shape).abs() + 0.1) * (experts < e),
        up_proj=randn(e, up, d).mul_(d**-0.5),
        down_proj=randn(e, d, h).mul_(h**-0.5),
        up_bias=randn(e, up).mul_(0.5) if sizes.bias else None,
        down_bias=randn(e, d).mul_(0.5) if sizes.bias else None,
        activation=sizes.activation,
        interleaved=sizes.interleaved,
    )


def upstream_of(problem: Problem) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.randn(problem.x.shape, device=DEVICE, dtype=problem.x.dtype, generator=generator)


def kernels(problem: Problem, **options) -> Solution:
    return solve(by_ops(moe_triton, **options), problem, upstream_of(problem))
