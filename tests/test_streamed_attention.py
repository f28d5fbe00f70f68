"""Attention over long caches, a run of keys at a time, is the softmax over all of them."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.ops import reference
from moe.streamed_attention import Partial, merge, streamed_attention

SIZES = {"b": 3, "n": 4, "g": 2, "s": 5, "l": 37, "c": 16}


def problem(
    dtype: torch.dtype = torch.float32, *, shared: bool = False, **changes: int
) -> tuple[Tensor, ...]:
    sizes = SIZES | changes
    generator = torch.Generator().manual_seed(sizes["l"])
    rows = 1 if shared else sizes["b"]
    queries = torch.randn(sizes["b"], sizes["n"], sizes["s"], sizes["c"], generator=generator)
    keys, values = (
        torch.randn(rows, sizes["g"], sizes["l"], sizes["c"], generator=generator).to(dtype) for _ in range(2)
    )
    return queries, keys, values


def truth(queries: Tensor, keys: Tensor, values: Tensor, scale: float, first: int | None) -> Tensor:
    keys, values = (x.double().expand(len(queries), -1, -1, -1) for x in (keys, values))
    s, l = queries.shape[2], keys.shape[2]
    allowed = None if first is None else torch.arange(l) <= torch.arange(s)[:, None] + first
    allowed = None if allowed is None else allowed[None, None].expand(len(queries), 1, s, l)
    return reference.attention(queries.double(), keys, values, allowed, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [False, True], ids=["each its own", "shared"])
@pytest.mark.parametrize("first", [None, 0, 9, 32])
@pytest.mark.parametrize("block", [1, 8, 4096])
def test_it_is_the_softmax_over_all_keys_a_query_sees(dtype, shared, first, block):
    given_ = problem(dtype, shared=shared)
    ours = streamed_attention(*given_, scale=0.3, first=first, block=block).out
    torch.testing.assert_close(ours.double(), truth(*given_, 0.3, first), rtol=1e-5, atol=1e-6)


def test_logits_of_a_trained_head_stay_exact():
    queries, keys, values = problem(l=5000)
    ours = streamed_attention(queries, keys, values, scale=6.0, block=64)
    expected = truth(queries, keys, values, 6.0, None)
    assert (queries.double() @ keys.double().repeat_interleave(2, 1).mT * 6).max() > 90
    torch.testing.assert_close(ours.out.double(), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 37), max_size=4))
def test_parts_of_the_keys_merge_to_the_whole(cuts):
    queries, keys, values = problem()
    edges = [0, *sorted(cuts), 37]
    parts = [
        streamed_attention(queries, keys[:, :, i:j], values[:, :, i:j], scale=0.3) for i, j in pairwise(edges)
    ]
    expected = truth(queries, keys, values, 0.3, None)
    torch.testing.assert_close(merge(parts).double(), expected, rtol=1e-5, atol=2e-6)


def test_a_sink_takes_its_share():
    queries, keys, values = problem()
    sinks = torch.tensor([0.0, 1.0, -2.0, 50.0])
    part = streamed_attention(queries, keys, values, scale=0.3)
    share = part.lse.exp() / (part.lse.exp() + sinks.exp()[:, None])
    torch.testing.assert_close(merge([part], sinks), part.out * share[..., None])


def test_what_lies_behind_the_keys_of_a_cache_is_not_read():
    queries, keys, values = problem()
    buffers = [torch.full((3, 2, 64, 16), torch.nan) for _ in range(2)]
    for buffer, held in zip(buffers, (keys, values), strict=True):
        buffer[:, :, :37] = held
    views = [buffer[:, :, :37] for buffer in buffers]
    ours = streamed_attention(queries, *views, scale=0.3)
    torch.testing.assert_close(ours.out, streamed_attention(queries, keys, values, scale=0.3).out)


def test_no_key_is_no_weight():
    queries, keys, values = problem(l=0)
    part = streamed_attention(queries, keys, values, scale=0.3)
    assert part.out.abs().max() == 0 and (part.lse == -torch.inf).all()
    whole = streamed_attention(*problem(), scale=0.3)
    torch.testing.assert_close(merge([part, whole]), whole.out)
    assert merge([part]).abs().max() == 0


def test_gradients_and_nonsense_are_refused():
    queries, keys, values = problem()
    with pytest.raises(ValueError, match="no gradients"):
        streamed_attention(queries.requires_grad_(), keys, values, scale=0.3)
    with torch.no_grad(), pytest.raises(ValueError, match="block=0 must be at least 1"):
        streamed_attention(queries, keys, values, scale=0.3, block=0)
    with pytest.raises(ValueError, match="no parts"):
        merge(list[Partial]())
