"""The kernels that sort pairs by expert give the integers of the reference, bit for bit, on every path."""

import pytest
import torch
from device import DEVICE, torch_may_warn
from helpers import AWKWARD_ROUTINGS, drop, random_experts
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe.ops import reference
from moe.ops.choose import choose_ops
from moe.plan import RoutingPlan, drop_over_capacity
from moe_triton import launch, routing

NAMES = ("pair_of_row", "row_of_pair", "offsets")
PATHS = {"few pairs": routing.FEW_PAIRS, "many pairs": -1}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)


def sort_on(path, experts, num_experts):
    """The kernels' answer on the CPU, by the path for few pairs or the one for many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "FEW_PAIRS", PATHS[path])
        answer = routing.sort_by_expert(experts.to(DEVICE), num_experts)
    return [tensor.cpu() for tensor in answer]


def assert_sorted(path, experts, num_experts):
    answer, expected = sort_on(path, experts, num_experts), reference.sort_by_expert(experts, num_experts)
    for name, ours, theirs in zip(NAMES, answer, expected, strict=True):
        assert ours.dtype == torch.int64, name
        assert torch.equal(ours, theirs), name


@EVERY_PATH
@pytest.mark.parametrize("name", AWKWARD_ROUTINGS)
def test_awkward_routings_sort_as_in_the_reference(path, name, poisoned_memory):
    assert_sorted(path, *AWKWARD_ROUTINGS[name])


@st.composite
def routings(draw):
    """Any ids (t k), also outside 0..e-1, of either integer type."""
    num_experts, top_k = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    inside = st.integers(0, num_experts - 1)
    outside = st.sampled_from([-1, -100, num_experts, num_experts + 1, 10**6, 2**31 - 1, -(2**31)])
    pairs = draw(st.lists(inside | inside | outside, max_size=60))
    tokens = len(pairs) // top_k
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.tensor(pairs[: tokens * top_k], dtype=dtype).view(tokens, top_k), num_experts


@EVERY_PATH
@given(case=routings())
def test_any_routing_sorts_as_in_the_reference(path, case):
    assert_sorted(path, *case)


SIZES = {
    "one expert": (300, 1, 1),
    "pairs of several chunks and blocks": (700, 2, 7),
    "a chunk, no pair more": (128, 2, 7),
    "one pair more than a chunk": (257, 1, 7),
    "one pair more than fits the small block": (13, 5, 9),
    "300 experts": (90, 4, 300),
    "more experts than the bins of a program": (30, 2, 1100),
    "a power of two of experts": (70, 4, 64),
}


@EVERY_PATH
@pytest.mark.parametrize("name", SIZES)
def test_sizes_beyond_one_block_sort_as_in_the_reference(path, name, poisoned_memory):
    tokens, top_k, num_experts = SIZES[name]
    experts = random_experts(tokens, top_k, num_experts)
    assert_sorted(path, drop(experts, num_experts, tokens=(0, 5, tokens - 1)), num_experts)


def test_chunks_beyond_one_block_are_summed(poisoned_memory):
    """The chunks of one expert are read in blocks of 256."""
    counts = torch.randint(0, 9, (600, 6), dtype=torch.int32, device=DEVICE)
    starts, totals = torch.empty_like(counts), torch.empty_like(counts[0])
    columns = {"counts_ptr": counts, "starts_ptr": starts, "totals_ptr": totals, "CHUNKS": 600, "E": 5}
    launch.launch(routing.sum_chunks_kernel, (1,), {**columns, "ROWS": 256, "EXPERTS": 8})
    assert torch.equal(starts[0], torch.zeros_like(starts[0]))
    assert torch.equal(torch.cat([starts[1:], totals[None]]), counts.cumsum(0, dtype=torch.int32))


@EVERY_PATH
@pytest.mark.parametrize("outside", [-1, 4, 5, 2**40, -(2**40), 2**32, 2**32 + 1], ids=lambda i: f"id {i}")
def test_a_pair_outside_the_experts_comes_last(path, outside, poisoned_memory):
    experts = torch.tensor([[outside, 0], [3, outside], [1, 2]])
    pair_of_row, row_of_pair, offsets = sort_on(path, experts, 4)
    assert pair_of_row.tolist() == [1, 4, 5, 2, 0, 3]
    assert row_of_pair.tolist() == [4, 0, 3, 5, 1, 2]
    assert offsets.tolist() == [0, 1, 2, 3, 4]


@EVERY_PATH
def test_tokens_keep_their_order_within_an_expert(path, poisoned_memory):
    pair_of_row, _, _ = sort_on(path, torch.ones(600, 1, dtype=torch.int32), 3)
    assert torch.equal(pair_of_row, torch.arange(600))


@EVERY_PATH
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_experts_may_lie_in_memory_in_any_order(path, dtype):
    experts = random_experts(11, 3, 6).to(dtype)
    for strided in (experts.t().contiguous().t(), experts.repeat(1, 2)[:, ::2], experts[:, :1].expand(11, 3)):
        assert_sorted(path, strided, 6)


def test_both_paths_meet_at_the_bound(monkeypatch):
    """At FEW_PAIRS pairs there is one launch, with one more there are four."""
    launches = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *_, **__: launches.append(grid))
    for pairs in (routing.FEW_PAIRS, routing.FEW_PAIRS + 1):
        routing.sort_pairs(torch.empty(pairs, 1, dtype=torch.int64, device="meta"), 8)
    assert len(launches) == 1 + 4


def test_a_plan_and_a_capacity_can_come_from_the_kernels():
    experts, weights = random_experts(20, 2, 5), torch.rand(20, 2)
    ours = RoutingPlan.from_experts(experts.to(DEVICE), 5, backend="triton")
    theirs = RoutingPlan.from_experts(experts, 5, backend="reference")
    for name in NAMES:
        assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)), name
    for policy in ("score", "position"):
        on_device = (experts.to(DEVICE), weights.to(DEVICE))
        kept = drop_over_capacity(*on_device, 5, 4, policy, backend="triton")
        assert torch.equal(
            kept.cpu(), drop_over_capacity(experts, weights, 5, 4, policy, backend="reference")
        )


def test_the_kernels_are_chosen_where_they_can_run():
    assert choose_ops(DEVICE, "triton").sort_by_expert is routing.sort_by_expert


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_sort_has_a_shape_without_data(tokens):
    shapes = [(2 * tokens,), (2 * tokens,), (5,)]
    on_meta = torch.empty(tokens, 2, dtype=torch.int64, device="meta")
    assert [tuple(t.shape) for t in routing.sort_by_expert(on_meta, 4)] == shapes
    with FakeTensorMode():
        fake = torch.empty(tokens, 2, dtype=torch.int32, device=DEVICE)
        answer = routing.sort_by_expert(fake, 4)
    assert [tuple(t.shape) for t in answer] == shapes
    assert {t.dtype for t in answer} == {torch.int64}


@torch_may_warn
def test_a_sort_compiles_for_any_number_of_tokens():
    torch._dynamo.reset()
    compiled = torch.compile(routing.sort_by_expert, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 8):
        experts = random_experts(tokens, 2, 4)
        expected = reference.sort_by_expert(experts, 4)
        for ours, theirs in zip(compiled(experts.to(DEVICE), 4), expected, strict=True):
            assert torch.equal(ours.cpu(), theirs)


def test_experts_of_one_axis_are_refused_by_name():
    with pytest.raises(ValueError, match=r"experts.*\(5,\).*t k"):
        routing.sort_by_expert(torch.zeros(5, dtype=torch.int64, device=DEVICE), 4)
