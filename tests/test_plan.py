"""The plan is a stable sort of (token, choice) pairs by expert; dropped pairs come last."""

import pytest
import torch
from helpers import AWKWARD_ROUTINGS, random_experts
from hypothesis import given
from hypothesis import strategies as st

from moe.plan import RoutingPlan, drop_over_capacity


@st.composite
def assignments(draw, ids_outside: bool = True):
    """Random experts (t k), distinct within a token; t may be 0; some ids may lie outside 0..e-1."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    tokens = draw(st.integers(0, 12))
    experts = random_experts(tokens, top_k, num_experts, seed=draw(st.integers(0, 999)))
    if ids_outside and tokens:
        outside = st.sampled_from([num_experts, num_experts + 1, -1, -100, 10**6])
        for token, choice, wrong in draw(
            st.lists(st.tuples(st.integers(0, tokens - 1), st.integers(0, top_k - 1), outside), max_size=6)
        ):
            experts[token, choice] = wrong
    return experts, num_experts


def kept_pairs(experts, num_experts):
    return [pair for pair, expert in enumerate(experts.flatten().tolist()) if 0 <= expert < num_experts]


@given(assignments())
def test_plan_is_a_stable_sort_by_expert(case):
    experts, num_experts = case
    plan = RoutingPlan.from_experts(experts, num_experts)
    pairs = experts.flatten().tolist()
    expected = sorted(kept_pairs(experts, num_experts), key=lambda pair: (pairs[pair], pair))
    assert plan.pair_of_row[: len(expected)].tolist() == expected


@given(assignments())
def test_rows_and_pairs_are_inverse_permutations(case):
    experts, num_experts = case
    plan = RoutingPlan.from_experts(experts, num_experts)
    everything = torch.arange(experts.numel())
    assert torch.equal(plan.pair_of_row.sort().values, everything)
    assert torch.equal(plan.pair_of_row[plan.row_of_pair], everything)
    assert torch.equal(plan.row_of_pair[plan.pair_of_row], everything)


@given(assignments())
def test_offsets_are_the_running_count_of_kept_pairs(case):
    experts, num_experts = case
    plan = RoutingPlan.from_experts(experts, num_experts)
    pairs = experts.flatten().tolist()
    expected = [0]
    for expert in range(num_experts):
        expected.append(expected[-1] + pairs.count(expert))
    assert plan.offsets.tolist() == expected


@given(assignments())
def test_each_row_knows_its_token(case):
    experts, num_experts = case
    plan = RoutingPlan.from_experts(experts, num_experts)
    assert plan.top_k == experts.shape[1]
    token_of_pair = torch.arange(experts.shape[0]).repeat_interleave(plan.top_k)
    assert torch.equal(plan.token_of_row, token_of_pair[plan.pair_of_row])


@pytest.mark.parametrize("outside", [4, 5, 10**9, -1, -7], ids=lambda i: f"id {i}")
def test_a_pair_outside_the_experts_sorts_last_and_is_not_counted(outside):
    experts = torch.tensor([[outside, 0], [3, outside], [1, 2]])
    plan = RoutingPlan.from_experts(experts, 4)
    assert plan.pair_of_row[:4].tolist() == [1, 4, 5, 2]
    assert sorted(plan.pair_of_row[4:].tolist()) == [0, 3]
    assert plan.offsets.tolist() == [0, 1, 2, 3, 4]


def test_a_plan_of_no_tokens_is_empty():
    plan = RoutingPlan.from_experts(torch.empty(0, 3, dtype=torch.int64), 5)
    assert plan.pair_of_row.shape == plan.row_of_pair.shape == (0,)
    assert plan.offsets.tolist() == [0] * 6
    assert plan.top_k == 3


def test_a_plan_takes_experts_of_32_bits():
    experts = random_experts(11, 3, 6)
    plan, narrow = (RoutingPlan.from_experts(ids, 6) for ids in (experts, experts.int()))
    assert torch.equal(plan.pair_of_row, narrow.pair_of_row)
    assert torch.equal(plan.offsets, narrow.offsets)


def test_a_plan_takes_experts_in_any_memory_order():
    experts = random_experts(11, 3, 6)
    plan = RoutingPlan.from_experts(experts, 6)
    strided = RoutingPlan.from_experts(experts.t().contiguous().t(), 6)
    assert torch.equal(plan.pair_of_row, strided.pair_of_row)
    assert torch.equal(plan.offsets, strided.offsets)


@pytest.mark.parametrize("name", AWKWARD_ROUTINGS)
def test_a_plan_holds_integers_only(name):
    plan = RoutingPlan.from_experts(*AWKWARD_ROUTINGS[name])
    assert {plan.pair_of_row.dtype, plan.row_of_pair.dtype, plan.offsets.dtype} == {torch.int64}


# Capacity


def drop_by_loops(experts, weights, num_experts, capacity, policy):
    """Each expert keeps its first `capacity` pairs, in the order of the tokens or of falling weight."""
    dropped = torch.full_like(experts, num_experts)
    for expert in range(num_experts):
        pairs = [
            (t, c)
            for t, row in enumerate(experts.tolist())
            for c, chosen in enumerate(row)
            if chosen == expert
        ]
        if policy == "score":
            pairs.sort(key=lambda pair: -weights[pair].item())
        for pair in pairs[:capacity]:
            dropped[pair] = expert
    return dropped


def same_decision(experts, expected, num_experts):
    """Equal where a pair is kept; where it is dropped, any id outside 0..e-1 says so."""
    inside = (experts >= 0) & (experts < num_experts)
    return torch.equal(torch.where(inside, experts, num_experts), expected)


@pytest.mark.parametrize("policy", ["score", "position"])
@given(case=assignments(ids_outside=False), capacity=st.integers(0, 6), pad=st.booleans())
def test_each_expert_keeps_its_best_pairs_up_to_capacity(policy, case, capacity, pad):
    experts, num_experts = case
    if pad and len(experts):
        experts[0] = num_experts
    order = torch.randperm(experts.numel(), generator=torch.Generator().manual_seed(experts.numel()))
    weights = (order.reshape(experts.shape) + 1) / (experts.numel() + 1)  # all different
    before, weights_before = experts.clone(), weights.clone()
    dropped = drop_over_capacity(experts, weights, num_experts, capacity, policy)
    assert same_decision(dropped, drop_by_loops(experts, weights, num_experts, capacity, policy), num_experts)
    assert torch.equal(experts, before), "the caller's tensor was changed"
    assert torch.equal(weights, weights_before), "weights are not renormalised"


@pytest.mark.parametrize("policy", ["score", "position"])
def test_no_capacity_drops_every_pair_and_ample_capacity_drops_none(policy):
    experts, weights = random_experts(10, 2, 4), torch.rand(10, 2)
    assert (drop_over_capacity(experts, weights, 4, 0, policy) == 4).all()
    assert torch.equal(drop_over_capacity(experts, weights, 4, 10**6, policy), experts)
    empty = torch.empty(0, 2, dtype=torch.int64)
    assert drop_over_capacity(empty, torch.empty(0, 2), 4, 3, policy).shape == (0, 2)


def test_equal_scores_fill_an_expert_exactly_to_its_capacity():
    experts = random_experts(20, 2, 4)
    kept = drop_over_capacity(experts, torch.full((20, 2), 0.5), 4, 5, "score")
    full = torch.bincount(experts.flatten(), minlength=4).clamp(max=5)
    assert torch.equal(torch.bincount(kept.flatten(), minlength=5)[:4], full)


def test_an_earlier_token_never_loses_its_place_to_a_later_one_by_position():
    experts, weights = random_experts(30, 2, 4), torch.rand(30, 2)
    whole = drop_over_capacity(experts, weights, 4, 6, "position")
    prefix = drop_over_capacity(experts[:17], weights[:17], 4, 6, "position")
    assert torch.equal(whole[:17], prefix)
