"""The path of a few pairs: experts_ffn straight from the router's choices, without a plan."""

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    ALPHA,
    AWKWARD_ROUTINGS,
    LIMIT,
    Problem,
    assert_same,
    by_loops,
    make_problem,
    random_experts,
)

from moe.ops import experts_loop, pytorch
from moe.ops.experts_loop import Nonlinearity, Projections
from moe.ops.shares import sum_over_shares


def projections_of(problem: Problem) -> Projections:
    return Projections(problem.up_proj, problem.down_proj, problem.up_bias, problem.down_bias)


def run_few(problem: Problem) -> torch.Tensor:
    how = Nonlinearity(problem.activation, problem.interleaved, LIMIT, ALPHA)
    return pytorch.experts_ffn_few(problem.x, problem.weights, problem.experts, projections_of(problem), how)


@pytest.mark.parametrize("name", AWKWARD_ROUTINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_few_pairs_give_what_loops_give(name, activation, poisoned_memory):
    problem = make_problem(*AWKWARD_ROUTINGS[name], activation=activation)
    assert_same(run_few(problem), by_loops(problem, **problem.leaves))


def test_the_same_bits_as_with_a_plan():
    problem = make_problem(random_experts(7, 3, 9), 9, d=64, h=48, dtype=torch.float32, bias=False)
    plan = problem.plan
    with_plan = pytorch.experts_ffn(
        problem.x, problem.weights, plan.pair_of_row, plan.row_of_pair, plan.offsets,
        problem.up_proj, problem.down_proj,
    )  # fmt: skip
    assert torch.equal(run_few(problem), with_plan)


def test_ids_outside_the_experts_count_for_nothing_whatever_they_meet():
    experts = torch.tensor([[0, 4], [-1, 2], [9, -7]])
    problem = make_problem(experts, 4)
    problem.weights[experts >= 4] = float("nan")
    problem.weights[experts < 0] = float("inf")
    assert_same(run_few(problem), by_loops(problem, **problem.leaves))


def test_threads_with_experts_of_their_own_give_the_same_answer(monkeypatch):
    shares = []

    def spy(work, ranges, zeros):
        shares.append(ranges)
        return sum_over_shares(work, ranges, zeros)

    monkeypatch.setattr("moe.ops.shares._SMALLEST_SHARE", 1)
    monkeypatch.setattr(experts_loop, "sum_over_shares", spy)
    problem = make_problem(random_experts(3, 4, 4), 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same(run_few(problem), by_loops(problem, **problem.leaves))
    finally:
        torch.set_num_threads(before)
    assert shares == [[range(0, 2), range(2, 4)]]


def test_only_a_few_pairs_on_a_cpu_without_gradients_are_few():
    def is_few(tokens: int, device: str = "cpu", grad: bool = False) -> bool:
        problem = make_problem(random_experts(tokens, 2, 4), 4).on(device)
        problem.up_proj.requires_grad_(grad)
        return pytorch.is_few(problem.x, problem.weights, projections_of(problem))

    assert is_few(1) and is_few(pytorch.FEW_PAIRS // 2)
    assert not is_few(pytorch.FEW_PAIRS // 2 + 1)
    assert not is_few(0)
    assert not is_few(1, device="meta")
    assert not is_few(1, grad=True)
    with torch.no_grad():
        assert is_few(1, grad=True)


def test_choices_that_do_not_match_their_weights_are_refused():
    problem = make_problem(random_experts(3, 2, 4), 4)
    how = Nonlinearity("swiglu", False, LIMIT, ALPHA)
    with pytest.raises(ValueError, match=r"experts has shape \(3, 1\).*\(3, 2\)"):
        pytorch.experts_ffn_few(
            problem.x, problem.weights, problem.experts[:, :1], projections_of(problem), how
        )
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\)"):
        pytorch.experts_ffn_few(
            problem.x[:, :5], problem.weights, problem.experts, projections_of(problem), how
        )
