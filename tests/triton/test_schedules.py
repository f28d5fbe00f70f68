"""A schedule changes the time and nothing else: every one of them gives the right value and gradients."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest
import torch
from accuracy import HALF, assert_same_bits, assert_solved, expected, kernels
from device import DEVICE, INTERPRETED
from helpers import drop, make_problem, random_experts, stored_transposed
from hypothesis import given
from hypothesis import strategies as st

from moe_triton import tiles
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
    "swapped operands, wide outputs": {"swap": True, "outs": 64, "registers": 128},
    "swapped operands, wide outputs, tma": {"swap": True, "outs": 64, "tma": True},
    "2 splits": {"splits": 2, "ins": 16},
    "4 splits, tma, persistent": {"rows": 16, "splits": 4, "ins": 16, "tma": True, "persistent": True},
}


@cache
def problem_and_answers(bias=True):
    """Rows of 16 bytes, so that tma is possible; full and part tiles, and an expert without rows."""
    tokens, d, h = (30, 40, 48) if INTERPRETED else (300, 136, 72)
    experts = drop(random_experts(tokens, 2, 4, among=(0, 1, 3)), 4, tokens=(2, 11), pairs=((4, 0),))
    problem = make_problem(experts, 4, d, h, dtype=HALF, bias=bias)
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


@pytest.mark.parametrize("name", ["16 rows, group of 1", "persistent", "4 splits, tma, persistent"])
def test_a_map_of_the_tiles_serves_as_well_as_a_search(name, poisoned_memory, monkeypatch):
    monkeypatch.setattr(tiles, "SEARCHED_PAIRS", 0)
    problem, answers = problem_and_answers()
    with forced(SCHEDULES[name]):
        assert_solved(kernels(problem), answers)


@pytest.mark.parametrize("rows", [16, 32])
def test_a_map_names_the_expert_of_every_tile(rows):
    counts = [300, 0, 90, 1, 16, 0]
    offsets = torch.tensor([0, *counts]).cumsum(0).to(DEVICE)
    per_expert = [-(-n // rows) for n in counts]
    plan = tiles.Plan(torch.arange(407, device=DEVICE), torch.arange(407, device=DEVICE), offsets, 1, {})
    bound = plan.tile_bound(rows)
    records = tiles.make_tile_map(offsets, bound, rows)[:, :5].tolist()
    ends = offsets.tolist()[1:]
    owned = [[i, sum(per_expert[:i]), n, ends[i] - counts[i], ends[i]] for i, n in enumerate(per_expert)]
    expected = [record for record in owned for _ in range(record[2])]
    assert records[0][0] == len(expected) <= bound
    assert records[1 : 1 + len(expected)] == expected
    assert [record[0] for record in records[1 + len(expected) :]] == [6] * (bound - len(expected))


@given(st.lists(st.integers(0, 200), min_size=1, max_size=9), st.sampled_from([16, 32, 64, 128]))
def test_the_bound_on_tiles_holds_for_every_routing_and_is_reached_by_one(counts, rows):
    def plan(p):
        ids = torch.empty(p, dtype=torch.int64)
        return tiles.Plan(ids, ids, torch.empty(len(counts) + 1), 1, {})

    p, e = sum(counts), len(counts)
    assert sum(-(-n // rows) for n in counts) <= plan(p).tile_bound(rows)
    busy = min(e, p)
    worst = [1] * (busy - 1) + [p - busy + 1] if busy else []
    assert (
        sum(-(-n // rows) for n in worst) <= plan(p).tile_bound(rows) <= sum(-(-n // rows) for n in worst) + e
    )


@pytest.mark.parametrize("what", PASSES)
def test_a_batch_invariant_schedule_is_one_for_every_number_of_pairs(what):
    for target in (Target("cuda", 90, 132), Target("cuda", 80, 108), Target("hip", "gfx942", 304)):
        for dtype in (torch.bfloat16, torch.float32):
            chosen = {
                choose_config(what, target, dtype, pairs, 8, 4096, 14336, batch_invariant=True)
                for pairs in (0, 1, 8, 100, 10_000, 1_000_000)
            }
            assert len(chosen) == 1 and chosen.pop().splits == 1


def test_forcing_a_schedule_ends_with_its_block():
    target = Target("cpu", "cpu", 4)
    sizes = (HALF, 100, 4, 64, 64)
    chosen = choose_config("up", target, *sizes)
    with override("up", replace(chosen, rows=64 if chosen.rows != 64 else 32)):
        assert choose_config("up", target, *sizes) != chosen
        assert choose_config("down", target, *sizes).rows >= 16
    assert choose_config("up", target, *sizes) == chosen


def test_a_forced_schedule_reaches_the_thread_in_which_autograd_runs_a_backward_pass():
    """On a GPU that is not the thread which calls backward."""
    sizes = (Target("cpu", "cpu", 4), HALF, 100, 4, 64, 64)
    forced = Config(16, 16, 16, 4, 2)
    with ThreadPoolExecutor(1) as pool, override("grad_pre", forced):
        assert pool.submit(choose_config, "grad_pre", *sizes).result() == forced


def test_a_single_token_of_wide_experts_is_split():
    """Too few tiles for the multiprocessors: the down-projection is cut, and added up in a fixed order."""
    problem = make_problem(random_experts(1, 2, 3), 3, 16, 512 if INTERPRETED else 4096, dtype=HALF)
    ours = kernels(problem)
    assert_solved(ours, expected(problem))
    assert_same_bits(kernels(problem), ours)
