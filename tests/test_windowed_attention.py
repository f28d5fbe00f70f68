"""Attention within a window, against the plain definition with a mask."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, assert_same, peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moe import windowed_attention as module
from moe.ops.reference import attention
from moe.windowed_attention import windowed_attention

SCALE = 0.7


def window_mask(queries: int, keys: int, window: int) -> Tensor:
    """(1 1 s l): from the places alone."""
    places = torch.arange(keys)
    distance = places[keys - queries :, None] - places
    return ((distance >= 0) & (distance < window))[None, None]


def random_inputs(b: int, n: int, g: int, s: int, l: int, c: int = 6, values: int = 6, sinks: bool = False):
    drawn = [torch.randn(b, n, s, c), torch.randn(b, g, l, c), torch.randn(b, g, l, values)]
    drawn += [torch.randn(n)] if sinks else []
    return [x.double().requires_grad_() for x in drawn]


def assert_equals_definition(inputs: list[Tensor], window: int, upstream: Tensor | None = None) -> None:
    """The value and every gradient."""
    sinks = inputs[3] if len(inputs) == 4 else None
    mask = window_mask(inputs[0].shape[2], inputs[1].shape[2], window)
    ours = windowed_attention(*inputs[:3], window, scale=SCALE, sinks=sinks)
    truth = attention(*inputs[:3], mask, scale=SCALE, sinks=sinks)
    assert_same(ours, truth, "output")
    upstream = torch.randn_like(truth) if upstream is None else upstream
    grads = (torch.autograd.grad(y, inputs, upstream, materialize_grads=True) for y in (ours, truth))
    names = ("queries", "keys", "values", "sinks")
    for name, ours_grad, truth_grad in zip(names[: len(inputs)], *grads, strict=True):
        assert_same(ours_grad, truth_grad, name, 1e-10)


AWKWARD = {
    "no queries": (2, 0, 5, 3),
    "no places": (2, 0, 0, 3),
    "an empty batch": (0, 40, 50, 3),
    "one place": (2, 1, 1, 4),
    "decoding": (2, 1, 50, 32),
    "decoding, the window not yet full": (2, 1, 20, 32),
    "window 1": (2, 70, 70, 1),
    "window 1 after a cache": (2, 70, 75, 1),
    "fewer queries than the window": (2, 9, 12, 32),
    "window of all keys": (2, 45, 70, 70),
    "window beyond all keys": (2, 45, 70, 1000),
    "one place over a block": (2, 33, 33, 32),
    "one place under two blocks": (2, 63, 80, 32),
    "whole blocks": (2, 96, 96, 32),
    "a cache of a part of the window": (2, 77, 90, 32),
    "a cache of the whole window": (2, 77, 108, 32),
    "a cache beyond the window": (2, 77, 400, 32),
    "a small odd window": (2, 81, 83, 5),
    "a window over two blocks": (1, 300, 310, 150),
    "a window over three blocks": (1, 420, 421, 290),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["each its own", "pairs", "one key head"])
def test_windowed_attention_is_attention_under_a_band(name, heads):
    b, s, l, window = AWKWARD[name]
    assert_equals_definition(random_inputs(b, *heads, s, l), window)


@pytest.mark.parametrize("name", [name for name in AWKWARD if AWKWARD[name][1] < 100])
def test_a_sink_joins_the_softmax_of_every_query(name):
    b, s, l, window = AWKWARD[name]
    assert_equals_definition(random_inputs(b, 4, 2, s, l, sinks=True), window)


@pytest.mark.parametrize("past", [0, 3, 9])
def test_wide_windows_go_block_by_block_to_the_same_answer(past, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_COPIED", 4)
    monkeypatch.setattr(module, "SMALLEST_BLOCK", 2)
    assert_equals_definition(random_inputs(2, 4, 2, 31, 31 + past, sinks=True), 7)


@given(st.integers(1, 150), st.integers(0, 60), st.integers(1, 80), st.sampled_from([(1, 1), (2, 1), (4, 2)]))
def test_any_sizes_give_the_definition(s, past, window, heads):
    assert_equals_definition(random_inputs(1, *heads, s, s + past, c=3, values=2), window)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(1, 50))
def test_chunks_over_a_cache_equal_the_whole(chunks, window):
    s = sum(chunks)
    queries, keys, values = random_inputs(1, 2, 1, s, s)
    whole = windowed_attention(queries, keys, values, window, scale=SCALE)
    ends = torch.tensor(chunks).cumsum(0).tolist()
    parts = [
        windowed_attention(
            queries[:, :, end - size : end], keys[:, :, :end], values[:, :, :end], window, scale=SCALE
        )
        for size, end in zip(chunks, ends, strict=True)
    ]
    assert_same(torch.cat(parts, dim=2), whole)


def test_the_memory_of_values_and_gradients_may_have_any_strides():
    queries, keys, values = random_inputs(2, 4, 2, 75, 90)
    for layout in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
        leaves = [layout(x.detach()).requires_grad_() for x in (queries, keys, values)]
        upstream = layout(torch.randn(2, 4, 75, 6, dtype=torch.float64))
        assert_equals_definition(leaves, 32, upstream)
    expanded = torch.randn(1, 1, 1, 1, dtype=torch.float64).expand(2, 4, 75, 6)
    assert_equals_definition([queries, keys, values], 32, expanded)


def test_a_view_of_a_cache_is_read_to_its_end_only():
    queries, keys, values = (x.detach() for x in random_inputs(2, 4, 2, 75, 110))
    buffers = [torch.full((2, 2, 128, 6), torch.nan, dtype=torch.float64) for _ in range(2)]
    for buffer, held in zip(buffers, (keys, values), strict=True):
        buffer[:, :, 20:110] = held[:, :, 20:]  # place 35 is the first query's, and 20 the first that it sees
    ours = windowed_attention(queries, *(x[:, :, :110] for x in buffers), 16, scale=SCALE)
    assert_same(ours, attention(queries, keys, values, window_mask(75, 110, 16), scale=SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [32, 128])
def test_rounding_is_that_of_torch_also_for_logits_of_90(dtype, window):
    keys = F.normalize(torch.randn(2, 1, 300, 16), dim=-1)
    queries = 90 * F.normalize(keys.roll(3, dims=2) + 0.1 * torch.randn(2, 2, 300, 16), dim=-1)
    inputs = [x.to(dtype) for x in (queries, keys, torch.randn(2, 1, 300, 16))]
    mask = window_mask(300, 300, window)
    truth = attention(*(x.double() for x in inputs), mask, scale=1.0)
    torchs = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=1.0, enable_gqa=True)
    ours = windowed_attention(*inputs, window, scale=1.0)
    assert ours.dtype == dtype
    assert_as_accurate(ours, torchs, truth)


def test_memory_grows_with_the_queries_and_not_with_their_square():
    def peak(s: int) -> int:
        inputs = [torch.randn(1, 2, s, 8, requires_grad=True) for _ in range(3)]
        return peak_bytes(lambda: windowed_attention(*inputs, 32, scale=SCALE).sum().backward())

    assert peak(8192) < 2.2 * peak(4096)


def test_it_compiles_to_one_graph_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        partial(windowed_attention, window=32, scale=SCALE), fullgraph=True, backend=counter
    )
    graphs = []
    for s in (150, 71, 230):
        inputs = random_inputs(2, 4, 2, s, s)
        upstream = torch.randn(2, 4, s, 6, dtype=torch.float64)
        ours, truth = compiled(*inputs), attention(*inputs, window_mask(s, s, 32), scale=SCALE)
        assert_same(ours, truth)
        grads = (torch.autograd.grad(y, inputs, upstream) for y in (ours, truth))
        for ours_grad, truth_grad in zip(*grads, strict=True):
            assert_same(ours_grad, truth_grad)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs == [1, 2, 2], "after the second length, no other should be compiled for"


WRONG = {
    "a window of nothing": ((2, 4, 2, 5, 5), 0, "window=0 must be at least 1"),
    "more queries than keys": ((2, 4, 2, 6, 5), 3, "6 queries, 5 keys"),
    "heads that do not share evenly": ((2, 4, 3, 5, 5), 3, "4 query heads cannot share 3"),
    "no key heads": ((2, 4, 0, 5, 5), 3, "4 query heads cannot share 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_meaning_is_refused(name):
    sizes, window, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        windowed_attention(*random_inputs(*sizes), window, scale=SCALE)
