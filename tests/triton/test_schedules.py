"""A schedule changes the time and nothing else: every one of them gives the right value and gradients."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest
import torch
from accuracy import HALF, assert_same_bits, assert_solved, expected, kernels
from device import INTERPRETED
from helpers import drop, make_problem, random_experts, stored_transposed

from moe_triton.config import PASSES, Config, choose_config, override
from moe_triton.launch import Target

PLAIN = Config(rows=32, outs=32, ins=32, num_warps=4, num_stages=2, group=8, tma=False)
SCHEDULES = {
    "16 rows, group of 1": {"rows": 16, "group": 1},
    "64 rows, wide outputs, tma": {"rows": 64, "outs": 64, "num_warps": 8, "tma": True},
    "128 rows, deep steps": {"rows": 128, "ins": 64, "num_stages": 3},
    "persistent": {"rows": 16, "persistent": True},
    "persistent, tma, group of 1": {"persistent": True, "tma": True, "group": 1},
    "swapped operands": {"rows": 16, "swap": True},
    "swapped operands, tma": {"swap": True, "tma": True},
    "2 splits": {"splits": 2, "ins": 16},
    "4 splits, tma, persistent": {"rows": 16, "splits": 4, "ins": 16, "tma": True, "persistent": True},
}


@cache
def problem_and_answers(bias=True):
    """Rows of 16 bytes, so that tma is possible; full and part tiles, and an expert without rows."""
    tokens, d, h = (45, 40, 48) if INTERPRETED else (500, 136, 72)
    experts = drop(random_experts(tokens, 3, 6, among=(0, 1, 3, 4, 5)), 6, tokens=(2, 11), pairs=((4, 0),))
    experts = torch.where(experts == 5, 1, experts)  # one expert has many rows, and tokens have it twice
    problem = make_problem(experts, 6, d, h, dtype=HALF, bias=bias)
    return problem, expected(problem)


def forced(schedule) -> ExitStack:
    """Every pass takes this schedule; only the down-projection is ever split."""
    stack = ExitStack()
    for what in PASSES:
        config = replace(PLAIN, **schedule)
        stack.enter_context(override(what, config if what == "down" else replace(config, splits=1)))
    return stack


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_right_answer(name, poisoned_memory):
    problem, answers = problem_and_answers()
    with forced(SCHEDULES[name]):
        assert_solved(kernels(problem), answers)


def transposed(problem):
    views = {name: stored_transposed(getattr(problem, name)) for name in ("up_proj", "down_proj")}
    return replace(problem, **views)


@pytest.mark.parametrize("name", ["64 rows, wide outputs, tma", "swapped operands"])
def test_a_schedule_serves_transposed_weights(name, poisoned_memory):
    problem, answers = problem_and_answers()
    with forced(SCHEDULES[name]):
        assert_solved(kernels(problem, stored=transposed), answers)


@pytest.mark.parametrize("name", ["2 splits", "persistent, tma, group of 1"])
def test_a_schedule_serves_weights_on_input_without_biases(name, poisoned_memory):
    problem, _ = problem_and_answers(bias=False)
    problem = replace(problem, weights_on_input=True)
    with forced(SCHEDULES[name]):
        assert_solved(kernels(problem), expected(problem))


def test_forcing_a_schedule_ends_with_its_block():
    target = Target("cpu", "cpu", 4)
    sizes = (HALF, 100, 4, 64, 64)
    chosen = choose_config("up", target, *sizes)
    with override("up", replace(chosen, rows=64 if chosen.rows != 64 else 32)):
        assert choose_config("up", target, *sizes) != chosen
        assert choose_config("down", target, *sizes).rows >= 16
    assert choose_config("up", target, *sizes) == chosen


def test_a_single_token_of_wide_experts_is_split():
    """Too few tiles for the multiprocessors: the heuristic cuts the down-projection by itself."""
    problem = make_problem(random_experts(1, 2, 3), 3, 16, 512 if INTERPRETED else 4096, dtype=HALF)
    assert_solved(kernels(problem), expected(problem))


def test_splits_are_added_in_a_fixed_order():
    problem, _ = problem_and_answers()
    with forced(SCHEDULES["4 splits, tma, persistent"]):
        assert_same_bits(kernels(problem), kernels(problem))
