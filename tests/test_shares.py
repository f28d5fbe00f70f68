"""Experts in threads of their own: the ranges cover all experts, each thread computes on one core."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.ops.shares import split_experts, sum_over_shares

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def bounds_of(counts: list[int]) -> list[int]:
    return [0, *torch.tensor(counts).cumsum(0).tolist()]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40), st.integers(1, 5))
def test_the_ranges_hold_every_expert_once_in_order(counts, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ranges = split_experts(bounds_of(counts), CPU)
    torch.set_num_threads(before)
    assert [expert for own in ranges for expert in own] == list(range(len(counts)))
    assert len(ranges) in (1, *range(2, threads + 1))


def test_even_work_is_split_evenly(two_threads):
    assert split_experts(bounds_of([100] * 8), CPU) == [range(0, 4), range(4, 8)]


def test_one_busy_expert_or_little_work_is_not_split(two_threads):
    assert split_experts(bounds_of([3000, 10, 10, 10]), CPU) == [range(0, 4)]
    assert split_experts(bounds_of([1, 0, 1, 1]), CPU) == [range(0, 4)]


def test_each_thread_computes_on_one_core_and_the_caller_keeps_its_own(two_threads):
    seen = {}

    def work(total, experts):
        seen[threading.get_ident()] = torch.get_num_threads()
        total += len(experts)

    total = sum_over_shares(work, [range(0, 3), range(3, 8)], lambda: torch.zeros(2))
    assert list(seen.values()) == [1] * len(seen) and threading.get_ident() not in seen
    assert torch.equal(total, torch.tensor([8.0, 8.0]))
    assert torch.get_num_threads() == 2


def test_an_error_in_a_thread_reaches_the_caller(two_threads):
    def work(total, experts):
        raise ArithmeticError("broken on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        sum_over_shares(work, [range(0, 1), range(1, 2)], lambda: torch.zeros(1))
