"""The path of a few pairs: experts_ffn straight from the router's choices, without a plan."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    ALPHA,
    AWKWARD_ROUTINGS,
    LIMIT,
    Problem,
    assert_as_accurate,
    assert_same,
    by_loops,
    make_problem,
    one_expert_at_a_time,
    random_experts,
    spread,
    stored_transposed,
)

from moe.ops import pytorch
from moe.ops.experts_loop import Nonlinearity, Projections


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["rows", "columns", "every other number"])
@pytest.mark.parametrize("h", [48, 33])
def test_a_few_pairs_err_no_more_than_torch(dtype, stored, h):
    lay = {"rows": lambda w: w, "columns": stored_transposed, "every other number": spread}[stored]
    truth = make_problem(random_experts(7, 3, 9), 9, d=65, h=h)
    problem = truth.to(dtype)
    problem = replace(problem, up_proj=lay(problem.up_proj), down_proj=lay(problem.down_proj))
    torch_same = one_expert_at_a_time(problem, **problem.leaves)
    rounded = problem.to(torch.float64)
    assert_as_accurate(run_few(problem), torch_same, by_loops(rounded, **rounded.leaves))


def test_the_same_pairs_give_the_same_bits():
    problem = make_problem(random_experts(7, 3, 9), 9, d=64, h=48, dtype=torch.float32)
    assert torch.equal(run_few(problem), run_few(problem))


def test_ids_outside_the_experts_count_for_nothing_whatever_they_meet():
    experts = torch.tensor([[0, 4], [-1, 2], [9, -7]])
    problem = make_problem(experts, 4)
    problem.weights[experts >= 4] = float("nan")
    problem.weights[experts < 0] = float("inf")
    assert_same(run_few(problem), by_loops(problem, **problem.leaves))


def test_only_a_few_pairs_on_a_cpu_without_gradients_are_few():
    def is_few(tokens: int, device: str = "cpu", grad: bool = False) -> bool:
        problem = make_problem(random_experts(tokens, 2, 4), 4).on(device)
        problem.up_proj.requires_grad_(grad)
        return pytorch.is_few(problem.x, problem.weights, projections_of(problem))

    assert is_few(1) and is_few(4 * pytorch.FEW_ROWS // 2)
    assert not is_few(4 * pytorch.FEW_ROWS // 2 + 1)
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
