"""Attention over caches of real lengths, on a device: a million keys, over 2³¹ numbers, and no waiting."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Answer, Problem, Sizes, assert_answered, make_attention
from device import DEVICE
from einops import rearrange, repeat
from helpers import assert_as_accurate
from test_gpu_sizes import needs_memory
from torch import Tensor

from moe_triton import attention_over_cache
from moe_triton.attention_schedule import PASS_KEYS

pytestmark = pytest.mark.gpu
MILLION = 1 << 20


@pytest.fixture(autouse=True)
def memory_goes_back():
    yield
    torch.cuda.empty_cache()


def answer(problem: Problem) -> Answer:
    return attention_over_cache(*problem.arguments)


def streamed(problem: Problem, dtype: torch.dtype, weights_dtype: torch.dtype, step: int = 1 << 16) -> Answer:
    """The definition over one head of keys in one cache, all query rows at once and `step` keys at a time."""
    b, n, s, _ = problem.queries.shape
    queries = rearrange(problem.queries, "b n s c -> (b n s) c").to(dtype)
    first = len(problem.keys[0, 0]) if problem.first is None else problem.first
    last = repeat(first + torch.arange(s, device=DEVICE), "s -> (b n s) 1", b=b, n=n)
    lse = torch.full((len(queries), 1), -torch.inf, device=DEVICE, dtype=dtype)
    out = torch.zeros_like(queries)
    for start in range(0, problem.keys.shape[2], step):
        keys, values = (t[0, 0, start : start + step].to(dtype) for t in (problem.keys, problem.values))
        places = start + torch.arange(len(keys), device=DEVICE)
        logits = (problem.scale * (queries @ keys.T)).masked_fill(places > last, -torch.inf)
        base = logits.amax(-1, keepdim=True).clamp(min=-1e30)
        weights = (logits - base).exp()
        both = torch.logaddexp(lse, base + weights.sum(-1, keepdim=True).log())
        part = weights.to(weights_dtype).to(dtype) @ values
        out, lse = out * (lse - both).exp() + part * (base - both).exp(), both
    return rearrange(out, "(b n s) c -> b n s c", b=b, n=n), rearrange(lse, "(b n s) 1 -> b n s", b=b, n=n)


def assert_streamed(ours: Answer, problem: Problem, ulps: float = 64.0) -> None:
    truth = streamed(problem, torch.float64, torch.float64)
    fused = streamed(problem, torch.float32, problem.keys.dtype)
    for name, our, their, true in zip(("out", "lse"), ours, fused, truth, strict=True):
        assert_as_accurate(our, their, true, ulps=ulps, name=name)


def rows_of(problem: Problem, which: slice) -> Problem:
    """Some of the queries, which see what they saw."""
    first = None if problem.first is None else problem.first + which.start
    return replace(problem, queries=problem.queries[:, :, which], first=first)


def part_of(ours: Answer, which: slice) -> Answer:
    return ours[0][:, :, which], ours[1][:, :, which]


REAL = {
    "decoding, a cache each": Sizes(b=5, s=1, l=3000, n=8, g=2, c=128, caches=5),
    "decoding, one cache": Sizes(b=64, s=1, l=3000, n=2, c=64),
    "a short prompt": Sizes(b=2, s=700, l=700, n=4, g=2, c=64, caches=2, first=0),
    "a piece of a prompt": Sizes(b=1, s=300, l=5000, n=4, g=2, c=128, first=4700),
    "wide heads": Sizes(b=1, s=300, l=2000, n=2, g=2, c=256, first=1700),
    "wide heads, few rows": Sizes(b=1, s=3, l=2000, n=2, g=2, c=256),
    "channels between": Sizes(b=1, s=200, l=2000, n=2, g=1, c=96, first=1800),
}
ALL_IN_BFLOAT16 = [(name, torch.bfloat16) for name in REAL]
OTHERS = (torch.float16, torch.float32)
SOME_IN_OTHERS = [(name, dtype) for name in ("a piece of a prompt", "wide heads") for dtype in OTHERS]


@pytest.mark.parametrize(("name", "dtype"), ALL_IN_BFLOAT16 + SOME_IN_OTHERS, ids=str)
def test_real_sizes_cost_the_rounding_of_the_weights(name, dtype, poisoned_memory):
    problem = make_attention(REAL[name], dtype)
    assert_answered(answer(problem), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_90_over_many_keys(dtype):
    problem = make_attention(Sizes(b=16, s=1, l=20_000, n=2, c=64), dtype, largest=60)
    problem.keys[0, 0, 12_345] = problem.queries[3, 0, 0]
    square = problem.queries[3, 0, 0].double().square().sum().item()
    problem = replace(problem, scale=90 / square)
    out, lse = answer(problem)
    assert_answered((out, lse), problem)
    assert abs(lse[3, 0, 0].item() - 90) < 0.1


def test_an_unaligned_cache_is_an_aligned_one():
    problem = make_attention(REAL["a piece of a prompt"], torch.bfloat16)
    odd = [torch.nn.functional.pad(t, (0, 1))[..., :-1] for t in (problem.keys, problem.values)]
    assert_answered(answer(replace(problem, keys=odd[0], values=odd[1])), problem)


# A million keys


@pytest.mark.parametrize("rows", [1, 64, 384])
def test_questions_over_a_million_keys(rows):
    problem = make_attention(Sizes(b=rows, s=1, l=MILLION, c=64), torch.bfloat16)
    assert_streamed(answer(problem), problem)


def test_a_piece_of_a_prompt_of_a_million_keys():
    """16,384 queries walk over all keys in passes; every thousandth is looked at."""
    s = 16_384
    problem = make_attention(Sizes(b=1, s=s, l=MILLION, n=2, c=64, first=MILLION - s), torch.bfloat16)
    ours = answer(problem)
    for start in (0, 1000, s - 1):
        some = slice(start, start + 1)
        assert_streamed(part_of(ours, some), rows_of(problem, some))


def test_even_weights_of_a_million_keys_lose_nothing():
    """Values around 1, all of the same weight: a sum cut off at every step would drift towards zero."""
    s = 2048
    problem = make_attention(Sizes(b=1, s=s, l=8 * PASS_KEYS, n=16, c=64), torch.bfloat16)
    problem.queries.zero_()
    problem.values.mul_(0.1).add_(1)
    out, lse = answer(problem)
    mean = problem.values.double().mean(2)[:, :, None]
    assert ((out - mean).abs().max() / mean.abs().max()).item() < 5e-4
    assert (lse - torch.tensor(8.0 * PASS_KEYS, dtype=torch.float64).log()).abs().max().item() < 1e-4


# More numbers than a 32-bit integer counts


def needle(keys: Tensor, values: Tensor, place: int) -> Tensor:
    """Plant at a place a key that a query of ones finds, and values of ones."""
    keys[0, 0, place], values[0, 0, place] = 2.0, 1.0
    return torch.full((1, 1, 1, keys.shape[3]), 2.0, device=DEVICE, dtype=keys.dtype)


@pytest.mark.parametrize("s", [1, 300])
def test_more_than_two_to_the_31_numbers_in_a_head_of_keys(s):
    """The offset of the last key is over 2³¹; before it lie zeros, with values of zero."""
    needs_memory(12)
    l = (1 << 31) // 128 + 4096
    keys, values = (torch.zeros(1, 1, l, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    queries = needle(keys, values, l - 1).expand(1, 1, s, 128).contiguous()
    out, lse = attention_over_cache(queries, keys, values, 40 / 512, None)  # a logit of 40 against 2²⁴ of 0
    assert (out - 1).abs().max().item() < 1e-3
    assert (lse - 40).abs().max().item() < 1e-3
    out, lse = attention_over_cache(queries, keys, values, 40 / 512, l - s - 1)  # the needle is not seen
    assert not out.any()
    assert (lse - torch.tensor(l - 1.0).log()).abs().max().item() < 1e-3


def test_more_than_two_to_the_31_numbers_before_a_head():
    needs_memory(12)
    l = (1 << 31) // 128 // 8 + 64
    keys, values = (torch.zeros(3, 3, l, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    queries = needle(keys[2:, 2:], values[2:, 2:], 5).expand(3, 3, 1, 128).contiguous()
    out, _ = attention_over_cache(queries, keys, values, 40 / 512)
    assert (out[2, 2] - 1).abs().max().item() < 1e-3
    out[2, 2] = 0
    assert not out.any()


# The host never waits


def short(seed: int = 0) -> Problem:
    return make_attention(Sizes(b=16, s=1, l=50_000, n=2, c=64), torch.bfloat16, seed=seed)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_never_waits_for_the_device():
    problem = short()
    expected = answer(problem)  # compiles the kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = answer(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(again, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_twenty_runs_give_the_same_bits():
    problem = short()
    first = answer(problem)
    for _ in range(20):
        for ours, theirs in zip(answer(problem), first, strict=True):
            assert torch.equal(ours, theirs)


def test_a_cuda_graph_follows_its_queries():
    problem, other = short(), short(seed=1)
    answer(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = answer(problem)
    problem.queries.copy_(other.queries)
    graph.replay()
    for ours, theirs in zip(recorded, answer(problem), strict=True):
        assert torch.equal(ours, theirs)
