"""Definition = composition of level 1 = fused operation, in value and every gradient, on every backend.

The truth is `helpers.by_loops`: one token and one choice at a time, in float64. Also: how work and memory
grow, custom operators, bad input.
"""

import inspect
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import (
    ACTIVATIONS,
    ALPHA,
    AWKWARD_ROUTINGS,
    GATED,
    LEAVES,
    LIMIT,
    WRONG,
    activate_by_hand,
    assert_as_accurate,
    assert_same,
    assert_solutions_agree,
    by_composition,
    by_loops,
    by_ops,
    bytes_allocated,
    drop,
    make_problem,
    one_expert_at_a_time,
    random_experts,
    solve,
    spread,
    stored_transposed,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe.ops import pytorch, reference
from moe.ops.choose import OPERATIONS
from moe.plan import RoutingPlan

BACKENDS = pytest.mark.parametrize("ops", [reference, pytorch], ids=["reference", "torch"])
LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def by_definition(problem, x, weights, up_proj, down_proj, up_bias=None, down_bias=None):
    return reference.moe_definition(
        x,
        problem.experts,
        weights,
        up_proj,
        down_proj,
        up_bias,
        down_bias,
        activation=problem.activation,
        interleaved=problem.interleaved,
        limit=LIMIT,
        alpha=ALPHA,
        weights_on_input=problem.weights_on_input,
    )


WAYS = {
    "definition": by_definition,
    "reference composition": by_composition(reference),
    "reference experts_ffn": by_ops(reference),
    "torch composition": by_composition(pytorch),
    "torch experts_ffn": by_ops(pytorch),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)
ON_EITHER_SIDE = pytest.mark.parametrize(
    "on_input", [False, True], ids=["weights on output", "weights on input"]
)


def test_both_backends_have_the_same_signatures():
    for name in OPERATIONS:
        ours, theirs = (inspect.signature(getattr(ops, name)) for ops in (reference, pytorch))
        shape = [[(p.name, p.kind, p.default) for p in s.parameters.values()] for s in (ours, theirs)]
        assert shape[0] == shape[1], name


# Value and every gradient


@EVERY_WAY
@ON_EITHER_SIDE
@pytest.mark.parametrize("name", AWKWARD_ROUTINGS)
def test_sorting_does_not_change_the_answer(way, on_input, name, poisoned_memory):
    problem = make_problem(*AWKWARD_ROUTINGS[name], weights_on_input=on_input)
    assert_solutions_agree(solve(WAYS[way], problem), solve(by_loops, problem))


@EVERY_WAY
@ON_EITHER_SIDE
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no bias"])
@pytest.mark.parametrize(
    ("activation", "interleaved"), [(a, False) for a in ACTIVATIONS] + [(a, True) for a in GATED], ids=str
)
def test_every_activation_has_its_formula_and_gradient(way, on_input, activation, interleaved, bias):
    experts = drop(random_experts(11, 3, 6, among=range(5)), 6, tokens=(2,), pairs=((4, 1),))
    problem = make_problem(
        experts, 6, activation=activation, interleaved=interleaved, bias=bias, weights_on_input=on_input
    )
    assert_solutions_agree(solve(WAYS[way], problem), solve(by_loops, problem))


@pytest.mark.parametrize("only", ["up_bias", "down_bias"])
@EVERY_WAY
@ON_EITHER_SIDE
def test_either_bias_may_be_missing_alone(way, on_input, only):
    problem = make_problem(random_experts(6, 2, 4), 4, weights_on_input=on_input)
    other = {"up_bias": "down_bias", "down_bias": "up_bias"}[only]
    problem = replace(problem, **{other: None})
    assert_solutions_agree(solve(WAYS[way], problem), solve(by_loops, problem))


@EVERY_WAY
@ON_EITHER_SIDE
def test_a_weight_of_zero_has_a_gradient(way, on_input):
    """On the output it silences its choice; on the input the expert still answers to a token of zeros."""
    problem = make_problem(random_experts(6, 2, 4), 4, weights_on_input=on_input)
    weights = problem.weights.clone()
    weights[1], weights[3, 0] = 0, 0
    problem = replace(problem, weights=weights)
    ours = solve(WAYS[way], problem)
    assert_solutions_agree(ours, solve(by_loops, problem))
    assert (ours["weights"][1] != 0).all()
    assert (ours["y"][1] != 0).all() == on_input


def test_weights_of_one_may_stand_on_either_side():
    problem = make_problem(random_experts(6, 2, 4), 4)
    problem = replace(problem, weights=torch.ones_like(problem.weights))
    before, after = (
        by_ops(pytorch)(replace(problem, weights_on_input=side), **problem.leaves) for side in (True, False)
    )
    assert_same(before, after)


@LOW_PRECISION
@EVERY_WAY
@ON_EITHER_SIDE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rounding_errors_stay_those_of_torch_in_the_same_dtype(way, on_input, activation, dtype):
    """The baseline runs each expert as torch would: gather, linear, activation, linear, weighted sum."""
    experts = drop(random_experts(48, 3, 6), 6, tokens=(7,))
    problem = make_problem(experts, 6, d=32, h=24, activation=activation, weights_on_input=on_input).to(dtype)
    truth = solve(by_loops, problem.to(torch.float64))
    baseline = solve(one_expert_at_a_time, problem)
    ours = solve(WAYS[way], problem)
    for leaf in truth:
        assert ours[leaf].dtype == dtype
        assert_as_accurate(ours[leaf], baseline[leaf], truth[leaf], name=leaf)


@BACKENDS
@ON_EITHER_SIDE
def test_float32_weights_meet_bfloat16_experts(ops, on_input):
    """A router works in float32 above bfloat16 experts; each gradient comes back in its own leaf's dtype."""
    problem = make_problem(random_experts(48, 2, 6), 6, d=32, h=24, weights_on_input=on_input)
    half = problem.to(torch.bfloat16)
    half = replace(half, weights=half.weights.float())
    truth = solve(by_loops, half.to(torch.float64))
    baseline = solve(one_expert_at_a_time, half)
    ours = solve(by_ops(ops), half)
    assert ours["y"].dtype == torch.bfloat16
    assert ours["weights"].dtype == torch.float32
    for leaf in truth:  # the arithmetic is bfloat16, and so is the ulp
        assert_as_accurate(ours[leaf].bfloat16(), baseline[leaf], truth[leaf], name=leaf)


@st.composite
def problems(draw):
    """Random t, k, e, skew towards low experts, padding, activation, layout, side of the weights."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(num_experts, 4)))
    busy = draw(st.integers(top_k, num_experts))  # skew: only the first `busy` experts are chosen
    tokens = draw(st.integers(0, 10))
    experts = random_experts(tokens, top_k, num_experts, seed=draw(st.integers(0, 99)), among=range(busy))
    if tokens:
        experts = drop(experts, num_experts, tokens=draw(st.sets(st.integers(0, tokens - 1))))
    activation = draw(st.sampled_from(ACTIVATIONS))
    return make_problem(
        experts,
        num_experts,
        d=draw(st.integers(1, 7)),
        h=draw(st.integers(1, 7)),
        activation=activation,
        interleaved=activation in GATED and draw(st.booleans()),
        weights_on_input=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@given(problem=problems(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_torch_backend_is_the_reference_for_any_routing(problem, dtype):
    if dtype == torch.float64:
        return assert_solutions_agree(solve(by_ops(pytorch), problem), solve(by_ops(reference), problem))
    problem = problem.to(dtype)
    truth, theirs = solve(by_ops(reference), problem.to(torch.float64)), solve(by_ops(reference), problem)
    ours = solve(by_ops(pytorch), problem)
    for leaf in truth:  # few numbers: the reference may be exact by luck, so some ulps of room
        assert_as_accurate(ours[leaf], theirs[leaf], truth[leaf], factor=4, ulps=16, name=leaf)


@BACKENDS
@ON_EITHER_SIDE
@pytest.mark.parametrize("interleaved", [False, True], ids=["concatenated", "interleaved"])
@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu", "relu2"])
def test_gradients_are_the_limits_of_finite_differences(ops, on_input, activation, interleaved):
    if interleaved and activation not in GATED:
        pytest.skip("nothing to interleave without a gate")
    experts = drop(random_experts(4, 2, 4, among=range(3)), 4, pairs=((1, 0),))
    problem = make_problem(
        experts, 4, d=3, h=2, activation=activation, interleaved=interleaved, weights_on_input=on_input
    )
    leaves = [leaf.requires_grad_() for leaf in problem.leaves.values()]
    assert torch.autograd.gradcheck(partial(by_ops(ops), problem), leaves, fast_mode=False)


# Memory layouts, dropped tokens, gradients asked for in part


@BACKENDS
def test_transposed_and_strided_weights_give_the_same_answer(ops):
    problem = make_problem(random_experts(9, 2, 4), 4)
    truth = solve(by_loops, problem)
    names = ("x", "weights", "up_proj", "down_proj")
    problem = replace(problem, **{name: stored_transposed(getattr(problem, name)) for name in names})
    problem = replace(problem, up_bias=spread(problem.up_bias))
    assert not problem.up_proj.is_contiguous()
    assert_solutions_agree(solve(by_ops(ops), problem), truth)


@BACKENDS
def test_experts_may_share_the_memory_of_one(ops):
    """An expanded weight has stride 0 along e; its gradient is not summed, each expert has its own."""
    problem = make_problem(random_experts(9, 2, 4), 4)
    names = ("up_proj", "down_proj", "up_bias", "down_bias")
    shared = replace(
        problem, **{name: getattr(problem, name)[:1].expand_as(getattr(problem, name)) for name in names}
    )
    separate = replace(problem, **{name: getattr(shared, name).clone() for name in names})
    assert_solutions_agree(solve(by_ops(ops), shared), solve(by_loops, separate))


LARGE = {
    "thousands of rows for one expert": (torch.arange(2600)[:, None] % 26 // 25, 3, 12, 10),
    "megabytes of pre-activation": (random_experts(1024, 4, 8, among=(0, 2, 5, 6, 7)), 8, 16, 128),
    "megabytes of weights": (drop(random_experts(40, 2, 16, among=range(9)), 16, tokens=(3,)), 16, 128, 256),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("transposed", [False, True], ids=["(e o i)", "(e i o)"])
@ON_EITHER_SIDE
@pytest.mark.parametrize("case", LARGE)
def test_large_sizes_give_the_same_answer(case, on_input, transposed, dtype, poisoned_memory, monkeypatch):
    """Large enough for another way to allocate memory, and for more than one step over an expert's rows."""
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    problem = make_problem(*LARGE[case], dtype=dtype, weights_on_input=on_input)
    truth, baseline = (
        solve(one_expert_at_a_time, problem.to(torch.float64)),
        solve(one_expert_at_a_time, problem),
    )
    if transposed:
        problem = replace(
            problem, **{n: stored_transposed(getattr(problem, n)) for n in ("up_proj", "down_proj")}
        )
    ours = solve(by_ops(pytorch), problem)
    for name in truth:
        assert_as_accurate(ours[name], baseline[name], truth[name], ulps=16, name=name)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@ON_EITHER_SIDE
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing_but_the_time(activation, on_input, dtype, two_threads, poisoned_memory):
    experts = drop(random_experts(400, 3, 12, among=range(11)), 12, tokens=range(17))
    problem = make_problem(
        experts, 12, d=8, h=6, activation=activation, dtype=dtype, weights_on_input=on_input
    )
    wide = problem.to(torch.float64)
    truth, baseline = solve(one_expert_at_a_time, wide), solve(one_expert_at_a_time, problem)
    first, second = solve(by_ops(pytorch), problem), solve(by_ops(pytorch), problem)
    assert torch.get_num_threads() == 2
    for name in truth:
        assert torch.equal(first[name], second[name]), name
        assert_as_accurate(first[name], baseline[name], truth[name], ulps=16, name=name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_threads_work_without_gradients(mode, two_threads):
    problem, apply = make_problem(random_experts(400, 3, 12), 12), by_ops(pytorch)
    expected = solve(apply, problem)["y"]
    with mode():
        leaves = {name: leaf.clone() for name, leaf in problem.leaves.items()}
        assert_same(apply(problem, **leaves), expected)


def poisoned(array):
    """All bits set: NaN in every floating dtype."""
    array.reshape(-1).view(np.uint8).fill(255)
    return array


@pytest.mark.parametrize("transposed", [False, True], ids=["(e o i)", "(e i o)"])
def test_one_token_reads_its_experts_and_copies_no_weights(transposed):
    """The forward pass of one token with 2 of 16 experts allocates less than the weights of one expert."""
    problem = make_problem(random_experts(1, 2, 16), 16, d=64, h=64, bias=False, dtype=torch.float32)
    if transposed:
        views = {name: stored_transposed(getattr(problem, name)) for name in ("up_proj", "down_proj")}
        problem = replace(problem, **views)
    apply = by_ops(pytorch)
    with torch.no_grad():
        allocated = bytes_allocated(lambda: apply(problem, **problem.leaves))
    assert 0 < allocated < problem.down_proj[0].nbytes


@EVERY_WAY
@pytest.mark.parametrize("kind", ["expanded", "transposed", "strided", "zero"])
def test_incoming_gradients_may_have_any_strides(way, kind):
    problem = make_problem(random_experts(9, 2, 4), 4)
    dense = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    upstream = {
        "expanded": torch.ones((), dtype=torch.float64).expand(9, 6),
        "transposed": dense.t().contiguous().t(),
        "strided": spread(dense),
        "zero": torch.zeros(1, 6, dtype=torch.float64).expand(9, 6),
    }[kind]
    assert_solutions_agree(
        solve(WAYS[way], problem, upstream), solve(by_loops, problem, upstream.contiguous())
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@BACKENDS
@ON_EITHER_SIDE
@pytest.mark.parametrize("compose", [by_ops, by_composition], ids=["experts_ffn", "composition"])
def test_what_a_dropped_token_holds_reaches_nothing(ops, compose, on_input, poison, poisoned_memory):
    experts = drop(random_experts(9, 2, 4), 4, tokens=(0, 3, 8))
    clean = make_problem(experts, 4, weights_on_input=on_input)
    truth = solve(by_loops, clean)
    x = clean.x.clone()
    x[[0, 3, 8]] = poison
    ours = solve(compose(ops), replace(clean, x=x))
    assert_solutions_agree(ours, truth)
    assert (ours["y"][[0, 3, 8]] == 0).all()
    assert (ours["x"][[0, 3, 8]] == 0).all()
    assert (ours["weights"][[0, 3, 8]] == 0).all()


@BACKENDS
@ON_EITHER_SIDE
@pytest.mark.parametrize(
    "wanted", [(leaf,) for leaf in LEAVES] + [("x", "weights"), ("up_proj", "down_bias")], ids="+".join
)
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(ops, on_input, wanted):
    problem = make_problem(random_experts(9, 2, 4), 4, weights_on_input=on_input)
    everything = solve(by_ops(ops), problem)
    part = solve(by_ops(ops), problem, wanted=wanted)
    assert part.keys() == {"y", *wanted}
    assert_solutions_agree(part, {name: everything[name] for name in part})


@BACKENDS
@ON_EITHER_SIDE
def test_without_gradients_the_value_is_the_same(ops, on_input):
    problem = make_problem(random_experts(9, 2, 4), 4, dtype=torch.float32, weights_on_input=on_input)
    apply = by_ops(ops)
    with torch.no_grad():
        inference = apply(problem, **problem.leaves)
    truth = by_loops(problem, **{name: leaf.double() for name, leaf in problem.leaves.items()})
    assert_as_accurate(inference, solve(apply, problem)["y"], truth)


@BACKENDS
@ON_EITHER_SIDE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_inputs_give_the_same_bits(ops, on_input, dtype):
    problem = make_problem(random_experts(64, 4, 8), 8, d=32, h=16, weights_on_input=on_input).to(dtype)
    first, second = solve(by_ops(ops), problem), solve(by_ops(ops), problem)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@BACKENDS
@ON_EITHER_SIDE
def test_arguments_are_left_as_they_were(ops, on_input):
    problem = make_problem(random_experts(9, 2, 4), 4, weights_on_input=on_input)
    before = {name: leaf.clone() for name, leaf in problem.leaves.items()}
    upstream = torch.randn(9, 6, dtype=torch.float64)
    upstream_before = upstream.clone()
    solve(by_ops(ops), problem, upstream)
    assert torch.equal(upstream, upstream_before)
    for name, leaf in problem.leaves.items():
        assert torch.equal(leaf, before[name]), name


# Level 1


@BACKENDS
def test_dispatch_gives_each_row_its_token(ops):
    experts, num_experts = AWKWARD_ROUTINGS["odd sizes"]
    plan, x = RoutingPlan.from_experts(experts, num_experts), torch.randn(13, 5, dtype=torch.float64)
    assert torch.equal(
        ops.dispatch(x, plan.pair_of_row, plan.row_of_pair, plan.top_k), x[plan.pair_of_row // 3]
    )


@BACKENDS
def test_dispatch_and_combine_are_transposes(ops):
    """With all weights 1: <dispatch(x), r> = <x, combine(r)>, and each is the other's gradient."""
    experts, num_experts = AWKWARD_ROUTINGS["odd sizes"]
    plan = RoutingPlan.from_experts(experts, num_experts)
    x = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    r = torch.randn(39, 5, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(13, 3, dtype=torch.float64)
    rows = ops.dispatch(x, plan.pair_of_row, plan.row_of_pair, plan.top_k)
    tokens = ops.combine(r, ones, plan.row_of_pair, plan.offsets)
    assert_same((rows * r).sum(), (x * tokens).sum(), tolerance=1e-10)
    assert_same(torch.autograd.grad(rows, x, r.detach())[0], tokens)
    assert_same(torch.autograd.grad(tokens, r, x.detach())[0], rows)


@BACKENDS
def test_grouped_linear_applies_the_owner_of_each_row(ops, poisoned_memory):
    offsets = torch.tensor([0, 3, 3, 4, 8])
    rows = torch.randn(10, 5, dtype=torch.float64)
    weight, bias = torch.randn(4, 7, 5, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    upstream = torch.randn(10, 7, dtype=torch.float64)
    rows[8:], upstream[8:] = float("nan"), float("nan")  # rows of nobody
    leaves = [leaf.requires_grad_() for leaf in (rows, weight, bias)]
    out = ops.grouped_linear(rows, weight, offsets, bias)
    expected = torch.zeros(10, 7, dtype=torch.float64)
    for row, owner in enumerate([0, 0, 0, 2, 3, 3, 3, 3]):
        expected[row] = weight[owner] @ rows[row] + bias[owner]
    assert_same(out, expected)
    ours = torch.autograd.grad(out, leaves, upstream)
    theirs = torch.autograd.grad(expected[:8], leaves, upstream[:8])
    for name, our, their in zip(("rows", "weight", "bias"), ours, theirs, strict=True):
        assert_same(our, their, name)


@BACKENDS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_follow_their_formulas(ops, activation):
    pre = torch.randn(9, 8, dtype=torch.float64) * 3
    for interleaved in (False, True) if activation in GATED else (False,):
        ours = ops.activate(pre, activation, interleaved=interleaved, limit=LIMIT, alpha=ALPHA)
        assert_same(ours, activate_by_hand(pre, activation, interleaved))
        defaults = ops.activate(pre, activation, interleaved=interleaved)
        assert_same(defaults, activate_by_hand(pre, activation, interleaved, limit=7.0, alpha=1.702))


@BACKENDS
def test_combine_is_the_weighted_sum_over_a_tokens_kept_choices(ops, poisoned_memory):
    experts, num_experts = AWKWARD_ROUTINGS["some pairs dropped"]
    problem, plan = make_problem(experts, num_experts), RoutingPlan.from_experts(experts, num_experts)
    out = torch.randn(18, 6, dtype=torch.float64)
    out[plan.offsets[-1] :] = float("nan")
    expected = torch.zeros(9, 6, dtype=torch.float64)
    weights, out = problem.weights.requires_grad_(), out.requires_grad_()
    for token, choice in (experts < 4).nonzero().tolist():
        expected[token] += weights[token, choice] * out[plan.row_of_pair[token * 2 + choice]]
    y = ops.combine(out, weights, plan.row_of_pair, plan.offsets)
    assert_same(y, expected)
    upstream = torch.randn(9, 6, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(value, (out, weights), upstream) for value in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        assert_same(our, their)


# Promises about memory and work


@ON_EITHER_SIDE
def test_the_torch_backend_keeps_x_and_the_pre_activation_and_no_other_activation(on_input):
    """x is t d numbers, the pre-activation p 2h. Gathered inputs would be p d, and so would outputs."""
    problem = make_problem(
        random_experts(64, 3, 5), 5, d=24, h=10, dtype=torch.float32, weights_on_input=on_input
    )
    leaves = {name: leaf.requires_grad_() for name, leaf in problem.leaves.items()}
    inputs = {leaf.untyped_storage().data_ptr(): name for name, leaf in leaves.items()}
    kept: dict[str, int] = {}

    def note(tensor):
        if tensor.is_floating_point():
            storage = tensor.untyped_storage()
            kept[inputs.get(storage.data_ptr(), f"activation {storage.data_ptr()}")] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        by_ops(pytorch)(problem, **leaves)
    activations = [size for name, size in kept.items() if name.startswith("activation")]
    assert activations == [4 * 64 * 3 * 2 * 10]
    assert kept["x"] == 4 * 64 * 24


def test_the_backward_pass_of_the_torch_backend_grows_with_e_and_not_with_its_square():
    """From 8 to 128 experts at fixed tokens, backward allocates a few times the weights themselves."""
    ratio = {}
    for num_experts in (8, 128):
        problem = make_problem(
            random_experts(32, 2, num_experts), num_experts, d=16, h=16, dtype=torch.float32
        )
        y = by_ops(pytorch)(problem, **{name: leaf.requires_grad_() for name, leaf in problem.leaves.items()})
        allocated = bytes_allocated(lambda y=y: y.backward(torch.ones_like(y)))
        ratio[num_experts] = allocated / (problem.up_proj.nbytes + problem.down_proj.nbytes)
    assert ratio[128] >= 1, "the gradients themselves were not counted"
    assert ratio[128] < 4


# Custom operators


class Recorder(TorchDispatchMode):
    """Remembers the first call of every custom operator of ours, by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe":
            self.calls.setdefault(func.name(), (func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def registered_operators() -> set[str]:
    """Those of the torch backend; the head's cross-entropy has its own check in test_decoder.py."""
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe::")}
    return ours - {"moe::linear_cross_entropy"}


def recorded_calls():
    experts = drop(random_experts(5, 2, 4, among=range(3)), 4, tokens=(1,))
    problem = make_problem(experts, 4, d=4, h=3, dtype=torch.float32)
    with Recorder() as recorder:
        solve(by_ops(pytorch), problem)
        solve(by_composition(pytorch), problem)
    return recorder.calls


def test_custom_operators_keep_their_promises_to_torch():
    """Schema, autograd registration, fake kernels and dynamic shapes of every operator that we register."""
    calls = recorded_calls()
    assert set(calls) == registered_operators(), (
        "an operator that neither level uses, or that hides from dispatch"
    )
    for name, (func, args, kwargs) in calls.items():
        requires_grad = not name.endswith("_backward")  # the gradient of a gradient is not offered
        args = [fresh(value, requires_grad) for value in args]
        torch.library.opcheck(func, args, {key: fresh(value, requires_grad) for key, value in kwargs.items()})


def fresh(value, requires_grad):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())


# Bad input


@BACKENDS
def test_bits_that_do_not_depend_on_the_batch_are_promised_by_triton_alone(ops):
    problem = make_problem(random_experts(5, 2, 4), 4)
    with pytest.raises(
        RuntimeError, match=r"batch_invariant=True needs the triton backend.*batch_invariant=False"
    ):
        by_ops(ops, batch_invariant=True)(problem, **problem.leaves)


@BACKENDS
def test_an_unknown_activation_is_refused_by_name(ops):
    with pytest.raises(ValueError, match=r"(?s)swishglu.*swiglu"):
        ops.activate(torch.randn(3, 4), "swishglu")
    problem = make_problem(random_experts(5, 2, 4), 4)
    with pytest.raises(ValueError, match="swishglu"):
        by_ops(ops)(replace(problem, activation="swishglu"), **problem.leaves)


@BACKENDS
@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_refused_by_name(ops, case):
    wrong, message = WRONG[case]
    problem = make_problem(random_experts(5, 2, 4), 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        by_ops(ops)(problem, **(problem.leaves | wrong))
