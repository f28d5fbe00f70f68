"""Real sizes, and more than 2³¹ numbers.

Axes: t tokens, k choices, p = t k pairs, e experts, d model width, h expert width.
"""

from dataclasses import replace

import pytest
import torch
from device import DEVICE
from gpu_problems import Sizes, kernels, problem_on_gpu, upstream_of
from helpers import LEAVES, Problem, assert_as_accurate, one_expert_at_a_time, random_experts, solve
from torch import Tensor

import moe_triton

pytestmark = pytest.mark.gpu
GIB = 1 << 30


@pytest.fixture(autouse=True)
def memory_goes_back():
    yield
    torch.cuda.empty_cache()


def needs_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free device memory, and there are {free / GIB:.1f}")


def assert_right(problem: Problem, ulps: float = 1.0) -> None:
    """At most twice the error of torch in the same dtype, value and every gradient."""
    ours, upstream = kernels(problem), upstream_of(problem)
    baseline = solve(one_expert_at_a_time, problem, upstream)
    truth = solve(one_expert_at_a_time, problem.to(torch.float64), upstream.double())
    for name, our in ours.items():
        assert our.dtype == baseline[name].dtype, name
        assert_as_accurate(our, baseline[name], truth[name], ulps=ulps, name=name)


# Real sizes


SIZES = {
    "fine-grained (OLMoE)": Sizes(2048, 8, 64, d=2048, h=1024),
    "coarse (Mixtral, half as wide)": Sizes(2048, 2, 8, d=2048, h=7168),
    "gpt-oss": Sizes(1024, 4, 8, 2880, 2880, "clamped_swiglu", interleaved=True, bias=True),
    "no gate": Sizes(1500, 2, 16, d=1000, h=600, activation="relu2", bias=True),
    "decoding": Sizes(3, 8, 64, d=2048, h=1024),
}


ALL_IN_BFLOAT16 = [(name, torch.bfloat16) for name in SIZES]
ONE_IN_THE_OTHERS = [("fine-grained (OLMoE)", dtype) for dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize(("name", "dtype"), ALL_IN_BFLOAT16 + ONE_IN_THE_OTHERS, ids=str)
def test_rounding_errors_stay_those_of_torch_in_the_same_dtype(name, dtype):
    needs_memory(24)
    assert_right(problem_on_gpu(SIZES[name], dtype), ulps=16 if dtype == torch.float32 else 1)


WIDE = Sizes(0, 0, 0, d=512, h=256)
ROUTINGS = {
    "no tokens": (torch.empty(0, 8, dtype=torch.int64), 64),
    "all to one": (torch.full((3000, 1), 5), 64),
    "more experts than pairs": (random_experts(3, 8, 512), 512),
    "all dropped": (torch.full((300, 2), 16), 16),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_awkward_routings_at_real_widths(name, poisoned_memory):
    experts, num_experts = ROUTINGS[name]
    assert_right(problem_on_gpu(replace(WIDE, num_experts=num_experts), torch.bfloat16, experts), ulps=2)


# More numbers than a 32-bit integer counts


def test_more_than_two_to_the_31_numbers_in_the_rows():
    """131,584 tokens of 16,384 numbers: the offset of the last row is over 2³¹."""
    needs_memory(48)
    sizes = Sizes(131_072 + 512, 1, 2, d=16_384, h=16)
    experts = torch.arange(sizes.tokens)[:, None] % 3  # the last third is dropped
    problem = problem_on_gpu(sizes, torch.bfloat16, experts)
    upstream = upstream_of(problem)
    ours = kernels(problem)
    shared = dict.fromkeys(("up_proj", "down_proj"), 0.0)
    floats = dict.fromkeys(shared, 0.0)
    for first in range(0, sizes.tokens, 8192):
        own = slice(first, first + 8192)
        part = replace(
            problem, experts=experts[own].to(DEVICE), x=problem.x[own], weights=problem.weights[own]
        )
        truth = solve(one_expert_at_a_time, part.to(torch.float64), upstream[own].double())
        baseline = solve(one_expert_at_a_time, part, upstream[own])
        for name in ("y", "x", "weights"):
            assert_as_accurate(ours[name][own], baseline[name], truth[name], ulps=2, name=f"{name} {own}")
        wide = solve(one_expert_at_a_time, part.to(torch.float32), upstream[own].float())
        for name in shared:
            shared[name] = shared[name] + truth[name]
            floats[name] = floats[name] + wide[name]
    for name, truth in shared.items():  # torch's best: a float32 sum, rounded once
        assert_as_accurate(ours[name], floats[name].bfloat16(), truth, name=name)


def test_more_than_two_to_the_31_numbers_in_the_experts():
    """The last of 132 experts begins over 2³¹ numbers behind the first."""
    needs_memory(32)
    sizes = Sizes(48, 2, 132, d=16_384, h=512)
    used = torch.tensor([0, 1, 130, 131])
    experts = random_experts(48, 2, 4)
    problem = problem_on_gpu(sizes, torch.bfloat16, used[experts])
    assert problem.up_proj[:131].numel() > 2**31
    ours = kernels(problem)
    narrow = {name: getattr(problem, name)[used.to(DEVICE)] for name in ("up_proj", "down_proj")}
    few = replace(problem, experts=experts.to(DEVICE), num_experts=4, **narrow)
    truth = solve(one_expert_at_a_time, few.to(torch.float64), upstream_of(few).double())
    baseline = solve(one_expert_at_a_time, few, upstream_of(few))
    for name in truth:
        our = ours[name][used.to(DEVICE)] if name in narrow else ours[name]
        assert_as_accurate(our, baseline[name], truth[name], name=name)
    for name in narrow:
        assert not ours[name][2:130].any(), f"{name} of experts that nobody chose"


def test_a_forward_pass_holds_its_output_and_the_pre_activation_and_no_more():
    """4 p h bytes of pre-activation and 2 t d of output in bfloat16, plus what the allocator rounds up."""
    problem = problem_on_gpu(Sizes(4096, 8, 16, d=1024, h=512), torch.bfloat16)
    leaves = {name: leaf.requires_grad_() for name, leaf in problem.leaves.items()}
    plan = problem.plan

    def forward() -> Tensor:
        tensors = (leaves[name] for name in LEAVES[2:4])
        return moe_triton.experts_ffn(
            leaves["x"], leaves["weights"], plan.pair_of_row, plan.row_of_pair, plan.offsets, *tensors
        )

    forward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    held = torch.cuda.memory_allocated() - before
    promised = 4 * 4096 * 8 * 512 + y.nbytes
    assert promised <= held <= promised + (4 << 20)
