"""What only a GPU can show: the host never waits, CUDA graphs, inductor, repeatability, streams, devices."""

from dataclasses import replace

import pytest
import torch
from accuracy import assert_same_bits
from device import DEVICE, torch_may_warn
from gpu_problems import Sizes, kernels, problem_on_gpu, upstream_of
from helpers import by_ops, fill, solve
from torch import Tensor

import moe_triton
from moe import MoE, MoEConfig

pytestmark = pytest.mark.gpu

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
    grads = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    return [y.detach(), *grads]  # no graph stays: its nodes would remember the stream that made them


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


MIDDLE = Sizes(1500, 4, 16, d=512, h=256)


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
