"""Attention over a cache is the softmax over all its keys, however the keys are cut up and laid out."""

from dataclasses import replace

import pytest
import torch
from accuracy import HALF
from attention_cases import Problem, Sizes, assert_answered, make_attention
from device import COMPILER, DEVICE, INTERPRETED, torch_may_warn
from test_kernel_promises import run_last_program_first

from moe_triton import attention_over_cache
from moe_triton.attention_schedule import Schedule, override

SCHEDULES = {
    "one walk": Schedule(16, 16, 4, 1),
    "taller than wide": Schedule(32, 16, 4, 2),
    "parts": Schedule(16, 16, 4, 1, splits=3),
    "more parts than keys": Schedule(16, 16, 4, 1, splits=64),
    "passes": Schedule(16, 32, 4, 1, pass_keys=32),
    "parts in passes": Schedule(16, 16, 4, 1, splits=2, pass_keys=16),
}
BOTH = "one walk", "parts in passes"
SIZES = {
    "one key": Sizes(l=1),
    "one query": Sizes(b=1, s=1),
    "as many keys as a step": Sizes(l=16),
    "one more": Sizes(l=17),
    "two query heads a key head": Sizes(n=4, g=2),
    "four query heads a key head": Sizes(n=4, g=1),
    "a cache for each sequence": Sizes(caches=2, n=4, g=2),
    "one cache of many sequences": Sizes(b=7, s=3),
    "two channels of three exist": Sizes(c=48),
    "the first key": Sizes(s=9, first=0),
    "the last query sees all": Sizes(s=9, l=40, first=31),
    "the last queries see all": Sizes(s=9, l=40, first=36),
    "all queries see all": Sizes(first=100),
    "nobody sees the last keys": Sizes(s=3, l=40, first=14),
    "the first queries see nothing": Sizes(s=9, l=40, first=-4),
    "two queries at the end": Sizes(s=2, l=33, first=31),
    "nothing to see for some in each pass": Sizes(b=1, s=45, l=45, first=-4),
    "causal, caches for each sequence": Sizes(s=11, l=20, caches=2, n=4, g=2, first=9),
    "causal, parts of a position in each tile": Sizes(b=3, s=7, l=40, n=4, first=33),
}
AWKWARD = (
    "one more",
    "nobody sees the last keys",
    "the first queries see nothing",
    "causal, caches for each sequence",
)
EMPTY = {
    "no keys": Sizes(l=0),
    "no keys, causal": Sizes(l=0, first=0),
    "nothing to see": Sizes(s=3, first=-3),
    "no queries": Sizes(s=0),
    "no sequences": Sizes(b=0),
    "no sequences, no caches": Sizes(b=0, caches=0),
    "no heads": Sizes(n=0, g=1),
}


def answer(problem: Problem):
    return attention_over_cache(*problem.arguments)


@pytest.mark.parametrize(
    ("sizes", "schedule"),
    [(sizes, schedule) for sizes in SIZES for schedule in SCHEDULES if sizes in AWKWARD or schedule in BOTH],
)
def test_every_schedule_gives_the_softmax_over_all_keys(sizes, schedule, poisoned_memory):
    problem = make_attention(SIZES[sizes])
    with override(SCHEDULES[schedule]):
        assert_answered(answer(problem), problem)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16] if INTERPRETED else [HALF, torch.float16], ids=str)
def test_a_cache_of_16_bits_costs_the_rounding_of_the_weights(dtype, schedule, poisoned_memory):
    problem = make_attention(SIZES["causal, caches for each sequence"], dtype)
    with override(SCHEDULES[schedule]):
        assert_answered(answer(problem), problem)


@pytest.mark.parametrize("name", EMPTY)
def test_without_keys_the_answer_is_nothing(name, poisoned_memory):
    problem = make_attention(EMPTY[name])
    out, lse = answer(problem)
    assert out.shape == problem.queries.shape and lse.shape == problem.queries.shape[:3]
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("length", [1, 30])
def test_without_an_override_the_shapes_choose(length, dtype):
    problem = make_attention(Sizes(b=1, n=4, g=2, s=length, l=200, first=200 - length), dtype)
    assert_answered(answer(problem), problem)


@pytest.mark.parametrize("schedule", ["one walk", "parts in passes"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_logits_of_90_leave_the_others_their_weights(dtype, schedule):
    """A needle of logit 90, one a thousandth below it, and a haystack of logits around 0 and down to -90."""
    problem = make_attention(Sizes(b=1, s=2, l=70), dtype, largest=60)
    needle = torch.linspace(0.5, 1.4, 16, device=DEVICE, dtype=dtype)
    problem.queries[:], problem.keys[:, :, 41], problem.keys[:, :, 12] = needle, needle, -needle
    problem.keys[:, :, 55] = needle
    problem.keys[:, :, 55, 0] -= 2**-10
    problem = replace(problem, scale=90.3 / needle.double().square().sum().item())
    with override(SCHEDULES[schedule]):
        out, lse = answer(problem)
    assert_answered((out, lse), problem)
    assert lse.min() > 90


def test_queries_in_float32_are_rounded_to_the_cache_once():
    problem = make_attention(Sizes(), HALF)
    exact = problem.queries.float() * (1 + 2**-13)
    for ours, theirs in zip(
        answer(replace(problem, queries=exact)), answer(replace(problem, queries=exact.to(HALF))), strict=True
    ):
        assert torch.equal(ours, theirs)


# Memory


LAYOUTS = {
    "positions before heads": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels before positions": lambda t: t.mT.contiguous().mT,
    "rows of an odd length": lambda t: torch.nn.functional.pad(t, (0, 1), value=torch.nan)[..., :-1],
    "an odd start": lambda t: torch.nn.functional.pad(t.flatten(), (1, 0))[1:].view(t.shape),
    "every other row": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], 3).flatten(2, 3)[:, :, ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(layout, dtype):
    problem = make_attention(Sizes(n=4, g=2, caches=2, first=30), dtype)
    lay = LAYOUTS[layout]
    other = replace(problem, queries=lay(problem.queries), keys=lay(problem.keys), values=lay(problem.values))
    assert torch.equal(other.keys, problem.keys)
    for schedule in ("one walk", "parts"):
        with override(SCHEDULES[schedule]):
            for ours, theirs in zip(answer(other), answer(problem), strict=True):
                assert torch.equal(ours, theirs)


def test_an_expanded_cache_is_one_cache():
    problem = make_attention(Sizes(b=3, n=4, g=2, first=30), HALF)
    keys, values = (t.expand(3, -1, -1, -1) for t in (problem.keys, problem.values))
    copies = replace(problem, keys=keys.contiguous(), values=values.contiguous())
    for ours, shared in zip(answer(replace(problem, keys=keys, values=values)), answer(problem), strict=True):
        assert torch.equal(ours, shared)
    assert_answered(answer(copies), problem)


@pytest.mark.parametrize("schedule", ["one walk", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_keys_that_nobody_sees_are_not_read(dtype, schedule, poisoned_memory):
    problem = make_attention(Sizes(s=3, l=40, first=14), dtype)
    problem.keys[:, :, 17:], problem.values[:, :, 17:] = torch.nan, torch.nan
    seen = replace(problem, keys=problem.keys[:, :, :17], values=problem.values[:, :, :17])
    with override(SCHEDULES[schedule]):
        assert_answered(answer(problem), seen)


# Promises


def test_caches_are_merged_by_their_lse():
    problem = make_attention(Sizes(l=61))
    near, far = (
        answer(replace(problem, keys=problem.keys[:, :, part], values=problem.values[:, :, part]))
        for part in (slice(0, 40), slice(40, None))
    )
    lse = torch.logaddexp(near[1], far[1])
    out = sum(part * (its - lse).exp()[..., None] for part, its in (near, far))
    assert_answered((out, lse), problem)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_inputs_give_the_same_bits_in_any_order_of_programs(schedule, monkeypatch):
    problem = make_attention(SIZES["causal, caches for each sequence"], HALF)
    with override(SCHEDULES[schedule]):
        first = answer(problem)
        if INTERPRETED:
            run_last_program_first(monkeypatch)
        for ours, theirs in zip(answer(problem), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nan_stays_with_those_who_see_it(schedule):
    problem = make_attention(Sizes(b=1, s=9, l=40, n=1, first=31))
    problem.queries[0, 0, 2] = torch.nan
    problem.keys[0, 0, 36] = torch.nan
    with override(SCHEDULES[schedule]):
        out, lse = answer(problem)
    meets = torch.tensor([i == 2 or 31 + i >= 36 for i in range(9)], device=DEVICE)
    assert torch.equal(lse[0, 0].isnan(), meets)
    assert torch.equal(out[0, 0].isnan().all(-1), meets) and torch.equal(out[0, 0].isnan().any(-1), meets)


def test_arguments_are_left_as_they_were():
    problem = make_attention(Sizes(first=30), HALF)
    before = [t.clone() for t in (problem.queries, problem.keys, problem.values)]
    answer(problem)
    for tensor, copy in zip((problem.queries, problem.keys, problem.values), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("name", ["queries", "keys", "values"])
def test_a_gradient_is_refused(name):
    problem = make_attention(Sizes())
    getattr(problem, name).requires_grad_()
    with pytest.raises(NotImplementedError, match=r"no gradients.*no_grad"):
        answer(problem)
    with torch.no_grad():
        answer(problem)


@torch_may_warn
def test_a_forward_mode_derivative_is_refused():
    problem = make_attention(Sizes())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        dual = torch.autograd.forward_ad.make_dual(problem.queries, torch.ones_like(problem.queries))
        answer(replace(problem, queries=dual))


QUERIES, CACHE = (2, 4, 3, 16), (2, 2, 8, 16)
SHAPES = {
    "three axes": ((4, 3, 16), CACHE, CACHE, r"queries has shape \(4, 3, 16\), expected \(b n s c\)"),
    "other channels": (QUERIES, (2, 2, 8, 32), CACHE, r"keys has shape .* expected \(2, 2, 8, 16\)"),
    "other sequences": (QUERIES, (3, 2, 8, 16), CACHE, r"keys has shape .* expected \(2, 2, 8, 16\)"),
    "values of other keys": (QUERIES, CACHE, (2, 2, 9, 16), r"values has shape .* expected \(2, 2, 8, 16\)"),
    "heads that do not divide": ((2, 3, 3, 16), CACHE, CACHE, "3 query heads cannot share 2 key heads"),
    "no key heads": (QUERIES, (2, 0, 8, 16), (2, 0, 8, 16), "4 query heads cannot share 0 key heads"),
    "odd channels": ((2, 4, 3, 20), (2, 2, 8, 20), (2, 2, 8, 20), r"c=20.*multiples of 16"),
    "too many channels": ((2, 4, 3, 272), (2, 2, 8, 272), (2, 2, 8, 272), r"c=272.*up to 256"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_do_not_fit_are_refused(name):
    *shapes, message = SHAPES[name]
    tensors = (torch.zeros(shape, device=DEVICE) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        attention_over_cache(*tensors, 1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(scale):
    with pytest.raises(ValueError, match=r"scale=.*must be a positive number"):
        answer(replace(make_attention(Sizes()), scale=scale))


def test_dtypes_that_do_not_fit_are_refused():
    problem = make_attention(Sizes())
    for changes, message in (
        ({"keys": problem.keys.double(), "values": problem.values.double()}, "keys is torch.float64"),
        ({"values": problem.values.half()}, "values is torch.float16, but keys is torch.float32"),
        ({"queries": problem.queries.half()}, "queries is torch.float16, but keys is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            answer(replace(problem, **changes))


def test_more_keys_than_are_counted_are_refused():
    many = torch.zeros(1, 1, 1, 16, device=DEVICE).expand(1, 1, 2**30, 16)
    with pytest.raises(ValueError, match="1073741824 keys"):
        attention_over_cache(many[:, :, :1], many, many, 1.0)


@torch_may_warn
def test_the_operation_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, first: [2 * t for t in attention_over_cache(q, k, v, 0.5, first)],
        backend=COMPILER, fullgraph=True,
    )  # fmt: skip
    for first in (None, 20, 30):
        problem = make_attention(Sizes(first=first))
        tensors = (problem.queries, problem.keys, problem.values)
        for ours, eager in zip(
            compiled(*tensors, first), attention_over_cache(*tensors, 0.5, first), strict=True
        ):
            assert torch.equal(ours, 2 * eager)
    torch._dynamo.reset()


@torch_may_warn
@pytest.mark.parametrize("first", [None, 30])
def test_the_operator_is_a_good_operator(first):
    problem = make_attention(Sizes(first=first))
    torch.library.opcheck(torch.ops.moe_triton.attention_over_cache.default, problem.arguments)
