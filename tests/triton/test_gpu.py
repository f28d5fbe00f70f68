"""What only a GPU can show: real sizes, more than 2³¹ numbers, no wait of the host, CUDA graphs, repeats.

Axes: t tokens, k choices, p = t k pairs, e experts, d model width, h expert width.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from accuracy import Solution, assert_same_bits
from device import DEVICE, torch_may_warn
from helpers import (
    GATED,
    LEAVES,
    Problem,
    assert_as_accurate,
    by_ops,
    drop,
    fill,
    one_expert_at_a_time,
    random_experts,
    solve,
)
from torch import Tensor

import moe_triton
from moe import MoE, MoEConfig

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_rounding_errors_stay_those_of_torch_in_the_same_dtype(name, dtype):
    needs_memory(24)
    assert_right(problem_on_gpu(SIZES[name], dtype), ulps=16 if dtype == torch.float32 else 1)


WIDE = Sizes(0, 0, 0, d=512, h=256)
ROUTINGS = {
    "no tokens": (torch.empty(0, 8, dtype=torch.int64), 64),
    "all to one": (torch.full((3000, 1), 5), 64),
    "more experts than pairs": (random_experts(3, 8, 512), 512),
    "one expert": (torch.zeros(700, 1, dtype=torch.int64), 1),
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


# The host never waits


LAYERS = {
    "plain": {},
    "biases": {"activation": "clamped_swiglu", "expert_bias": True, "is_transposed": True},
    "capacity": {"capacity_factor": 1.0, "capacity_policy": "score"},
    "groups": {"scoring_func": "sigmoid", "use_selection_bias": True, "n_group": 4, "topk_group": 2},
}


def layer_of(name: str) -> MoE:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4}
    layer = fill(MoE(MoEConfig(**sizes, **LAYERS[name]), backend="triton"), std=0.1)
    return layer.to(DEVICE, torch.bfloat16)


def training_step(layer: MoE, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Router, plan and experts, there and back: y, then the gradients of x and of every parameter."""
    y = layer(x).y
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]


def inputs(tokens: int = 333, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x, upstream = (
        torch.randn(tokens, 256, device=DEVICE, dtype=torch.bfloat16, generator=generator) for _ in range(2)
    )
    return x.requires_grad_(), upstream


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", LAYERS)
def test_the_host_never_waits_for_the_device(name):
    layer, (x, upstream) = layer_of(name), inputs()
    expected = training_step(layer, x, upstream)  # compiles the kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = training_step(layer, x, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(again, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_a_cuda_graph_of_a_training_step_follows_its_routing(name):
    """Captured with one batch, replayed with another: other experts, other counts, the bits of eager."""
    layer, (x, upstream) = layer_of(name), inputs()
    captured = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training_step(layer, x, upstream)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(captured):
        recorded = training_step(layer, x, upstream)
    for seed in (1, 2):
        new_x, new_upstream = inputs(seed=seed)
        with torch.no_grad():
            new_x[: 100 * seed] = new_x[0]  # a crowd for the experts of one token
            x.copy_(new_x)
            upstream.copy_(new_upstream)
        captured.replay()
        for ours, theirs in zip(recorded, training_step(layer, new_x, new_upstream), strict=True):
            assert torch.equal(ours, theirs)


@torch_may_warn
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_layer_compiles_with_inductor(mode):
    torch._dynamo.reset()
    layer = layer_of("plain")
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for seed in range(4):  # cuda graphs are recorded in the second run and replayed from the third on
        torch.compiler.cudagraph_mark_step_begin()
        x, upstream = inputs(seed=seed)
        ours, eager = training_step(compiled, x, upstream), training_step(layer, x, upstream)
        for our, their in zip(ours, eager, strict=True):
            torch.testing.assert_close(our, their, rtol=0.05, atol=0.05 * their.abs().max().item())
    torch._dynamo.reset()


# Repeatability, streams, devices, memory


MIDDLE = Sizes(1500, 4, 16, d=512, h=256, bias=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_twenty_runs_give_the_same_bits(dtype):
    problem = problem_on_gpu(MIDDLE, dtype)
    first = kernels(problem)
    for _ in range(20):
        assert_same_bits(kernels(problem), first)


def test_batch_invariant_outputs_have_the_same_bits_in_every_company():
    problem = problem_on_gpu(MIDDLE, torch.bfloat16)
    apply = by_ops(moe_triton, batch_invariant=True)

    def outputs(tokens: Tensor) -> Tensor:
        fields = ("experts", "x", "weights")
        company = replace(problem, **{name: getattr(problem, name)[tokens] for name in fields})
        with torch.no_grad():
            return apply(company, **company.leaves)

    everybody = outputs(torch.arange(1500))
    for tokens in (torch.tensor([700]), torch.arange(33), torch.arange(1500).flip(0), torch.arange(200, 900)):
        assert torch.equal(outputs(tokens), everybody[tokens.to(DEVICE)])


def test_kernels_run_on_the_stream_of_the_caller():
    problem = problem_on_gpu(MIDDLE, torch.bfloat16)
    expected, side = kernels(problem), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = replace(problem, x=problem.x.clone().zero_())
        torch.cuda._sleep(50_000_000)  # whoever runs on another stream reads x before it is there
        late.x.copy_(problem.x)
        ours = kernels(late)
    torch.cuda.synchronize()
    assert_same_bits(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    problem = problem_on_gpu(MIDDLE, torch.bfloat16)
    expected = kernels(problem)
    there = solve(by_ops(moe_triton), problem.on("cuda:1"), upstream_of(problem).to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_same_bits({name: tensor.to(DEVICE) for name, tensor in there.items()}, expected)


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
