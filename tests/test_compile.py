"""torch.compile sees one graph, whatever the routing, and keeps it when the number of tokens changes."""

import pytest
import torch
from helpers import (
    assert_same,
    assert_solutions_agree,
    by_composition,
    by_ops,
    drop,
    fill,
    make_problem,
    random_experts,
    solve,
    tiny_config,
)
from torch._dynamo.testing import CompileCounterWithBackend

from moe import MoE
from moe.losses import load_balancing_loss, router_z_loss
from moe.ops import pytorch

FEATURES = {
    "plain": {},
    "groups, selection bias, shared expert": {
        "scoring_func": "sigmoid",
        "use_selection_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
    },
    "gpt-oss": {
        "activation": "clamped_swiglu",
        "expert_bias": True,
        "is_transposed": True,
        "is_concatenated": False,
        "topk_before_score": True,
        "router_bias": True,
    },
    "weights on the input": {"apply_router_weight_on_input": True, "num_experts_per_tok": 1},
    "capacity by score": {"capacity_factor": 1.0, "capacity_policy": "score"},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(layer, x, mask=None):
    """Everything a training step asks of a layer, as tensors."""
    out = layer(x, mask)
    objective = out.y.square().mean() + load_balancing_loss([out.routing]) + router_z_loss(out.routing)
    return out.y, objective, out.routing.experts, out.routing.tokens_per_expert(), out.plan.offsets


def outcome(step, layer, x, mask=None):
    x = x.detach().requires_grad_()
    y, objective, *integers = step(layer, x, mask)
    return [y, objective, *integers, *torch.autograd.grad(objective, [x, *layer.parameters()])]


@pytest.mark.parametrize("feature", FEATURES)
def test_a_compiled_layer_gives_the_same_values_and_gradients_in_one_graph(feature):
    layer = fill(MoE(tiny_config(router_dtype="float64", **FEATURES[feature])).double())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for seed, tokens in enumerate((17, 40, 8)):
        x = torch.randn(tokens, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for ours, eager in zip(outcome(compiled, layer, x), outcome(run, layer, x), strict=True):
            assert_same(ours, eager)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1, "it compiled again for another number of tokens"


def test_a_compiled_layer_honours_a_mask_in_batches_of_any_shape():
    layer = fill(MoE(tiny_config(router_dtype="float64")).double())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for batch, length in ((2, 9), (5, 4)):
        x = torch.randn(batch, length, 12, dtype=torch.float64)
        mask = torch.arange(length) < torch.arange(2, 2 + batch)[:, None]
        for ours, eager in zip(outcome(compiled, layer, x, mask), outcome(run, layer, x, mask), strict=True):
            assert_same(ours, eager)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1, "it compiled again for another batch"


def test_a_compiled_layer_follows_its_routing_and_not_the_one_it_was_traced_with():
    """All tokens to one expert first, then another one: no count is baked into the graph."""
    layer = fill(MoE(tiny_config(router_dtype="float64", num_experts_per_tok=1)).double())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.rand(9, 12, dtype=torch.float64)
    for favourite in (3, 0, 7):
        with torch.no_grad():
            layer.router.weight.zero_()[favourite] = 5.0
        ours, eager = outcome(compiled, layer, x), outcome(run, layer, x)
        assert (ours[2] == favourite).all()
        for our, their in zip(ours, eager, strict=True):
            assert_same(our, their)


def test_compiled_under_autocast():
    layer = fill(MoE(tiny_config()))
    x = torch.randn(16, 12)

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).y

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert compiled(x).dtype == torch.bfloat16
    assert torch.equal(compiled(x), step(x))


def test_compiled_without_gradients():
    layer = fill(MoE(tiny_config(router_dtype="float64")).double())
    compiled = torch.compile(lambda x: layer(x).y, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        assert_same(compiled(x), layer(x).y)
        assert_same(compiled(x[:1]), layer(x[:1]).y)


@pytest.mark.parametrize("form", [by_ops, by_composition], ids=["experts_ffn", "level 1"])
def test_every_operation_compiles_alone(form):
    experts = drop(random_experts(9, 2, 4), 4, tokens=(3,))
    problem = make_problem(experts, 4)
    eager = form(pytorch)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert_solutions_agree(solve(compiled, problem), solve(eager, problem))
