"""The kernels as torch sees them: custom operators, torch.compile, checkpointing, autocast, the MoE layer."""

import inspect
from dataclasses import replace
from functools import cache

import pytest
import torch
from accuracy import HALF, assert_same_bits, kernels, random_upstream, solve_here
from device import COMPILER, DEVICE, torch_may_warn
from helpers import (
    WRONG,
    assert_as_accurate,
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
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moe_triton
from moe import MoE
from moe.ops import reference


@pytest.fixture
def fresh_compiler():
    """Traces with no memory of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def some_dropped(dtype=torch.float32, tokens=9, seed=0, **changes):
    experts = drop(random_experts(tokens, 2, 4, seed, among=range(3)), 4, tokens=(3,))
    return replace(make_problem(experts, 4, dtype=dtype, seed=seed), **changes)


@pytest.mark.parametrize("name", ["dispatch", "grouped_linear", "activate", "combine", "experts_ffn"])
def test_the_kernels_have_the_signatures_of_the_reference(name):
    ours, theirs = (inspect.signature(getattr(ops, name)) for ops in (moe_triton, reference))
    shape = [[(p.name, p.kind, p.default) for p in s.parameters.values()] for s in (ours, theirs)]
    assert shape[0] == shape[1]


# Custom operators


class Recorder(TorchDispatchMode):
    """Remembers the first call of every custom operator of ours, by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_triton":
            self.calls.setdefault(func.name(), (func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@cache
def recorded_calls():
    """No pair is dropped: opcheck compares all memory, and rows that nobody owns hold what they like."""
    problem = make_problem(random_experts(5, 2, 4, among=range(3)), 4, dtype=torch.float32).on(DEVICE)
    rows, grad = (torch.randn(10, width, device=DEVICE) for width in (6, 10))
    main = torch.zeros(4, 10, 6, device=DEVICE)
    with Recorder() as recorder:
        solve(by_ops(moe_triton), problem)
        solve(by_composition(moe_triton), problem)
        moe_triton.sort_by_expert(problem.experts, problem.num_experts)
        moe_triton.grouped_linear_grad_rows(grad, problem.up_proj, problem.plan.offsets)
        moe_triton.grouped_linear_grad_weight(grad, rows, problem.plan.offsets)
        moe_triton.grouped_linear_grad_weight(grad, rows, problem.plan.offsets, out=main)
        cache = torch.randn(1, 2, 7, 16, device=DEVICE)
        moe_triton.attention_over_cache(torch.randn(2, 4, 3, 16, device=DEVICE), cache, cache + 1, 0.3)
    return recorder.calls


def fresh(value, requires_grad):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())


def registered() -> set[str]:
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe_triton::")}


@torch_may_warn
@pytest.mark.parametrize("name", sorted(registered()))
def test_custom_operators_keep_their_promises_to_torch(name):
    """Schema, autograd registration, fake kernels and dynamic shapes of every operator that we register."""
    calls = recorded_calls()
    assert name in calls, "an operator that neither level uses, or that hides from dispatch"
    func, args, kwargs = calls[name]
    # No gradient of a gradient is offered, and none of attention over a cache
    requires_grad = not any(word in name for word in ("_backward", "_grad", "attention_over_cache"))
    args = [fresh(value, requires_grad) for value in args]
    torch.library.opcheck(func, args, {key: fresh(value, requires_grad) for key, value in kwargs.items()})


@pytest.mark.parametrize("form", [by_ops, by_composition], ids=["experts_ffn", "level 1"])
@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), lambda y: y.sum()], ids=["square", "linear"])
def test_the_gradient_of_a_gradient_is_refused(loss, form):
    """Also where the gradient that comes in is a constant: beside another term it would silently be zero."""
    problem = some_dropped().on(DEVICE)
    leaves = {name: leaf.requires_grad_() for name, leaf in problem.leaves.items()}
    y = form(moe_triton)(problem, **leaves)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss(y), leaves["x"], create_graph=True)
        (grad.sum() + leaves["x"].sum()).backward()


@pytest.mark.parametrize("form", [by_ops, by_composition], ids=["experts_ffn", "level 1"])
def test_autograd_calls_the_kernels_itself_where_nobody_else_looks(form):
    problem = some_dropped().on(DEVICE)
    leaves = {name: leaf.requires_grad_() for name, leaf in problem.leaves.items()}
    assert "Direct" in form(moe_triton)(problem, **leaves).grad_fn.name()
    with Recorder() as recorder:
        assert "Direct" not in form(moe_triton)(problem, **leaves).grad_fn.name()
    assert recorder.calls


@torch_may_warn
def test_forward_mode_derivatives_are_refused():
    """No operator of torch.library has them: they would silently be zero."""
    problem = some_dropped().on(DEVICE)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(problem.x, torch.ones_like(problem.x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            by_ops(moe_triton)(problem, **(problem.leaves | {"x": x}))
        assert by_ops(moe_triton)(problem, **problem.leaves).isfinite().all()


# Compilation


@torch_may_warn
@pytest.mark.parametrize("form", [by_ops, by_composition], ids=["experts_ffn", "level 1"])
def test_compiled_for_any_number_of_tokens_in_one_graph(form, fresh_compiler):
    counter = CompileCounterWithBackend(COMPILER)
    eager = form(moe_triton)
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for seed, tokens in enumerate((7, 5)):
        problem = some_dropped(HALF, tokens, seed)
        assert_same_bits(solve_here(compiled, problem), solve_here(eager, problem))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1, "it compiled again for another number of tokens"


@torch_may_warn
def test_compiled_without_gradients(fresh_compiler):
    problem = some_dropped(HALF).on(DEVICE)
    eager = by_ops(moe_triton)
    compiled = torch.compile(eager, fullgraph=True, backend=COMPILER)
    with torch.no_grad():
        assert torch.equal(compiled(problem, **problem.leaves), eager(problem, **problem.leaves))


@torch_may_warn
def test_the_gradients_of_level_1_compile_in_one_graph(fresh_compiler):
    """A training loop of its own may call them by name, and keep main gradients in float32."""
    offsets = torch.tensor([0, 3, 5, 5, 9], device=DEVICE)
    weight, main = torch.randn(4, 12, 8, device=DEVICE, dtype=HALF), torch.randn(4, 12, 8, device=DEVICE)

    def gradients(grad, rows, main):
        of_weight = moe_triton.grouped_linear_grad_weight(grad, rows, offsets)
        moe_triton.grouped_linear_grad_weight(grad, rows, offsets, out=main)
        return moe_triton.grouped_linear_grad_rows(grad, weight, offsets), of_weight, main

    counter = CompileCounterWithBackend(COMPILER)
    compiled = torch.compile(gradients, fullgraph=True, dynamic=True, backend=counter)
    for pairs in (9, 12):
        grad, rows = (torch.randn(pairs, width, device=DEVICE, dtype=HALF) for width in (12, 8))
        ours, eager = compiled(grad, rows, main.clone()), gradients(grad, rows, main.clone())
        for our, their in zip(ours, eager, strict=True):
            assert torch.equal(our, their)
    assert counter.frame_count == 1


FEATURES = {
    "plain": {},
    "gpt-oss, with a capacity": {
        "activation": "clamped_swiglu",
        "expert_bias": True,
        "is_transposed": True,
        "is_concatenated": False,
        "topk_before_score": True,
        "router_bias": True,
        "capacity_factor": 1.0,
        "capacity_policy": "score",
    },
}


def layer_of(feature, backend="triton", dtype=torch.float32):
    config = tiny_config(router_dtype="float64", **FEATURES[feature])
    return fill(MoE(config, backend=backend)).to(DEVICE, dtype)


def step(layer, x):
    """A layer's output and the gradients of x and of all parameters, on the CPU."""
    x = x.to(DEVICE).detach().requires_grad_()
    y = layer(x).y
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    grads = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    return {"y": y.detach().cpu()} | {name: grad.cpu() for name, grad in zip(names, grads, strict=True)}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_layer_on_kernels_computes_what_a_layer_on_torch_does(feature):
    x = torch.randn(17, 12)
    ours, theirs = step(layer_of(feature), x), step(layer_of(feature, "torch"), x)
    truth = step(layer_of(feature, "torch", torch.float64), x.double())
    for name in truth:
        assert_as_accurate(ours[name], theirs[name], truth[name], ulps=16, name=name)


@torch_may_warn
def test_a_layer_on_kernels_compiles_once(fresh_compiler):
    layer = layer_of("gpt-oss, with a capacity")
    counter = CompileCounterWithBackend(COMPILER)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for tokens in (9, 6):
        x = torch.randn(tokens, 12)
        ours, eager = step(compiled, x), step(layer, x)
        for name, grad in ours.items():
            torch.testing.assert_close(grad, eager[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-5)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1, "it compiled again for another number of tokens"


# Checkpointing and autocast


def test_recomputing_the_forward_pass_changes_no_bit():
    problem = some_dropped(HALF)
    eager = by_ops(moe_triton)

    def recomputed(problem, **leaves):
        return checkpoint(eager, problem, **leaves, use_reentrant=False)

    assert_same_bits(solve_here(recomputed, problem), kernels(problem))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_narrows_the_experts_and_leaves_the_weights(dtype):
    """The same bits as with tensors that were cast by hand, and gradients in each leaf's own dtype."""
    problem = some_dropped()
    upstream = random_upstream(problem).to(dtype)

    def under_autocast(problem, **leaves):
        with torch.autocast(DEVICE, dtype):
            return by_ops(moe_triton)(problem, **leaves)

    ours = solve_here(under_autocast, problem, upstream)
    by_hand = kernels(replace(problem.to(dtype), weights=problem.weights), upstream)
    assert ours["y"].dtype == dtype
    for name in problem.leaves:
        assert ours[name].dtype == torch.float32, name
    assert by_hand["weights"].dtype == torch.float32
    assert_same_bits(ours, {name: value.to(ours[name].dtype) for name, value in by_hand.items()})


def test_a_layer_under_autocast_gives_the_dtype_of_autocast():
    layer, x = layer_of("plain"), torch.randn(9, 12, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x).y
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())


# The plan


def test_a_plan_may_lie_in_memory_in_any_order():
    """And hold 32-bit integers."""
    problem = some_dropped().on(DEVICE)
    plan, rows = problem.plan, torch.randn(problem.experts.numel(), 6, device=DEVICE)
    parts = {"pair_of_row": plan.pair_of_row, "row_of_pair": plan.row_of_pair, "offsets": plan.offsets}
    k = problem.experts.shape[1]

    def everything(pair_of_row, row_of_pair, offsets):
        x, weights, up_proj, down_proj, *biases = problem.leaves.values()
        layer = moe_triton.experts_ffn(
            x, weights, pair_of_row, row_of_pair, offsets, up_proj, down_proj, *biases
        )
        return (
            layer,
            moe_triton.dispatch(x, pair_of_row, row_of_pair, k),
            moe_triton.combine(rows, weights, row_of_pair, offsets),
            moe_triton.grouped_linear(rows, up_proj, offsets),
            moe_triton.grouped_linear_grad_rows(rows, down_proj, offsets),
            moe_triton.grouped_linear_grad_weight(rows, rows, offsets),
        )

    expected = everything(**parts)
    for change in (lambda part: torch.stack([part, -part], 1)[:, 0], lambda part: part.int()):
        for name, part in parts.items():
            ours = everything(**(parts | {name: change(part)}))
            for our, their in zip(ours, expected, strict=True):
                assert torch.equal(our, their), name


# Bad input


@pytest.mark.parametrize("name", ["pair_of_row", "row_of_pair", "offsets"])
def test_a_plan_that_holds_no_integers_is_refused_by_name(name):
    problem = some_dropped().on(DEVICE)
    plan = {part: getattr(problem.plan, part) for part in ("pair_of_row", "row_of_pair", "offsets")}
    plan[name] = plan[name].float()
    tensors = {leaf: problem.leaves[leaf] for leaf in ("x", "weights", "up_proj", "down_proj")}
    with pytest.raises(ValueError, match=rf"{name} is torch.float32.*integers"):
        moe_triton.experts_ffn(**plan, **tensors)


def test_experts_that_are_no_integers_are_refused():
    with pytest.raises(ValueError, match=r"experts is torch.float32"):
        moe_triton.sort_by_expert(torch.zeros(3, 2, device=DEVICE), 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"out": torch.zeros(1, 5, 6, device=DEVICE).expand(4, 5, 6)}, r"out.*expanded"),
        ({"out": torch.zeros(4, 6, 5)}, r"out.*4, 6, 5.*4, 5, 6"),
        ({"offsets": torch.tensor([0.0, 1, 3, 3, 6])}, r"offsets.*integers"),
        ({"grad": torch.randn(6, 5).double(), "rows": torch.randn(6, 6).double()}, r"float64"),
        ({"rows": torch.randn(7, 6)}, r"rows.*7.*6"),
    ],
    ids=["expanded", "shape", "offsets", "dtype", "rows"],
)
def test_the_gradient_of_a_weight_refuses_what_does_not_fit_by_name(wrong, message):
    tensors = {
        "grad": torch.randn(6, 5),
        "rows": torch.randn(6, 6),
        "offsets": torch.tensor([0, 1, 3, 3, 6]),
        "out": torch.zeros(4, 5, 6),
    } | wrong
    with pytest.raises(ValueError, match=message):
        moe_triton.grouped_linear_grad_weight(**{name: tensor.to(DEVICE) for name, tensor in tensors.items()})


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_refused_by_name(case):
    wrong, message = WRONG[case]
    wrong = {name: tensor if tensor.is_meta else tensor.to(DEVICE) for name, tensor in wrong.items()}
    problem = make_problem(random_experts(5, 2, 4), 4, dtype=torch.float32).on(DEVICE)
    with pytest.raises(ValueError, match=message):
        by_ops(moe_triton)(problem, **(problem.leaves | wrong))


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(ValueError, match=r"(?s)swishglu.*swiglu"):
        moe_triton.activate(torch.randn(3, 4, device=DEVICE), "swishglu")
    problem = make_problem(random_experts(5, 2, 4), 4, dtype=torch.float32, activation="swiglu").on(DEVICE)
    with pytest.raises(ValueError, match=r"(?s)swishglu.*swiglu"):
        by_ops(moe_triton)(replace(problem, activation="swishglu"), **problem.leaves)


def test_float64_is_refused_with_the_way_out():
    problem = make_problem(random_experts(5, 2, 4), 4).on(DEVICE)
    with pytest.raises(ValueError, match=r"(?s)float64.*(reference|torch)"):
        by_ops(moe_triton)(problem, **problem.leaves)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": torch.randn(6, 7)}, r"rows.*7.*6"),
        ({"bias": torch.randn(4, 6)}, r"bias.*6.*5"),
        ({"offsets": torch.tensor([0, 2, 6])}, r"offsets.*3.*5"),
        ({"weight": torch.randn(4, 5, 6).half()}, r"float16"),
    ],
    ids=["rows", "bias", "offsets", "dtype"],
)
def test_grouped_linear_refuses_what_does_not_fit_by_name(wrong, message):
    tensors = {
        "rows": torch.randn(6, 6),
        "weight": torch.randn(4, 5, 6),
        "offsets": torch.tensor([0, 1, 3, 3, 6]),
        "bias": torch.randn(4, 5),
    } | wrong
    with pytest.raises(ValueError, match=message):
        moe_triton.grouped_linear(**{name: tensor.to(DEVICE) for name, tensor in tensors.items()})
