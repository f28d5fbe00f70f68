"""The cache of a decoder: windows of constant memory, passes that fail, few bits, forks, and refusals."""

from dataclasses import replace

import pytest
import torch
from decoder_variants import BASE, LATENT, LONG, VARIANTS, drawn, tokens
from torch import Tensor

from moe import Decoder
from moe.kv_cache import SPARE, KVCache
from moe.prefill import cache_bytes, prefill

LATENT_LONG = LATENT | {"canon_set": ("AC", "AC", "A"), "sliding_window": 3, "layer_types": "LLG"}
FORKED = [
    "long context",
    "long context of one key head",
    "long context of experts",
    "long context, full in the middle",
    "sinks",
    "window",
    "convolutions",
    "latents",
    "latents and convolutions",
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def read(decoder: Decoder, ids: Tensor, **options) -> KVCache:
    cache = KVCache(**options)
    decoder(ids, cache=cache)
    return cache


def assert_close(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


# Windows


@pytest.mark.parametrize("window", [1, 2, 5, 300])
def test_a_window_takes_the_same_memory_after_any_number_of_tokens(window):
    decoder = Decoder(replace(BASE, sliding_window=window, canon_set=("A", "B", "C"))).eval()
    cache, ids, sizes = KVCache(), tokens(2, 40), []
    for _ in range(20):
        decoder.hidden(ids, cache=cache, at=0)
        sizes.append(cache.nbytes)
    kept = window - 1
    most = 3 * 2 * 2 * 8 * 2 * (kept + max(kept, SPARE)) * 4  # layers, keys and values, heads, channels, rows
    taps = 2 * 3 * (24 + 48 + 16 + 16 + 24) * 4
    assert cache.length == 800 and max(sizes) <= most + taps
    assert len(set(sizes[10:])) == 1


@pytest.mark.parametrize("window", [1, 2, 7, 20])
def test_a_window_that_was_moved_many_times_holds_its_last_tokens(window, monkeypatch):
    monkeypatch.setattr("moe.kv_cache.SPARE", 5)
    decoder = Decoder(replace(BASE, num_hidden_layers=1, sliding_window=window)).double().eval()
    ids, cache = tokens(1, 100), KVCache()
    pieces = ids.split([1] * 40 + [3, 30, 1, 1, 25], dim=1)
    logits = torch.cat([decoder(piece, cache=cache).logits for piece in pieces], dim=1)
    assert_close(logits, decoder(ids).logits)


def test_what_a_cache_takes_is_known_before():
    for changes in ({}, LONG, LONG | {"layer_types": "LLL", "attention_init": "normal"}, LATENT):
        config = replace(BASE, **changes)
        decoder = Decoder(config).eval()
        small, large = (read(decoder, tokens(1, n), capacity=n).nbytes for n in (50, 150))
        assert large - small == cache_bytes(config, 100)


# Passes that fail


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", FORKED)
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_pass_that_fails_in_any_layer_leaves_the_cache_as_it_was(name, fails, monkeypatch):
    decoder, ids = drawn(name), tokens(2, 14)
    whole = decoder(ids).logits
    for sizes in ([9, 5], [1, 1, 12]):
        cache, parts = KVCache(capacity=4), []
        for piece in ids.split(sizes, dim=1):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(decoder.model.layers[fails].mlp, "forward", interrupt)
                decoder((piece + 1) % 23, cache=cache)
            before = cache.length
            parts.append(decoder(piece, cache=cache).logits)
            assert cache.length == before + piece.shape[1]
        assert_close(torch.cat(parts, dim=1), whole)


def test_a_first_pass_that_failed_may_be_followed_by_another_batch_and_dtype(monkeypatch):
    decoder, ids = drawn("long context"), tokens(2, 14)
    for fails in (0, 2):
        cache = KVCache()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(decoder.model.layers[fails].mlp, "forward", interrupt)
            decoder.float()(tokens(3, 5), mask=torch.arange(5).expand(3, 5) > 1, cache=cache)
        decoder.double()
        parts = [decoder(piece, cache=cache).logits for piece in ids.split([4, 10], dim=1)]
        assert_close(torch.cat(parts, dim=1), decoder(ids).logits)


def test_nothing_stays_of_a_first_pass_of_another_model_that_failed(monkeypatch):
    other, decoder = drawn("long context, full in the middle"), drawn("sinks and windows")
    cache, fresh, ids = KVCache(), KVCache(), tokens(1, 9)
    for layer in (3, 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(other.model.layers[layer].mlp, "forward", interrupt)
            other(ids, cache=cache)
    for each in (cache, fresh):
        decoder(ids, cache=each)
    assert cache.nbytes == fresh.nbytes
    more = tokens(2, 5)
    assert torch.equal(decoder(more, cache=cache.fork(2)).logits, decoder(more, cache=fresh.fork(2)).logits)


# Few bits


class Rounding(KVCache):
    """An fp32 cache whose entries are rounded by hand, in layers without a window."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.kind = kind

    def append(self, layer: int, *new: Tensor, window: int | None = None) -> tuple[Tensor, ...]:
        if window is None:
            new = tuple(x.to(self.kind).to(x.dtype) for x in new)
        return super().append(layer, *new, window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FORKED)
def test_a_cache_in_few_bits_rounds_what_full_layers_keep_and_nothing_else(name, dtype):
    decoder, ids = drawn(name), tokens(2, 20)  # float64, so that noise tips no rounding
    ours, by_hand = KVCache(dtype=dtype), Rounding(dtype)
    for piece in ids.split([9, 1, 1, 4, 5], dim=1):
        logits, truth = (decoder(piece, cache=cache).logits for cache in (ours, by_hand))
        assert_close(logits, truth)
    full = [i for i in range(decoder.config.num_hidden_layers) if decoder.config.window(i) is None]
    if full:
        saved = cache_bytes(decoder.config, 512, torch.float64) - cache_bytes(decoder.config, 512, dtype)
        assert by_hand.nbytes - ours.nbytes == saved


def test_a_cache_in_few_bits_takes_padding():
    decoder, ids = drawn("long context"), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    ours, by_hand = KVCache(dtype=torch.bfloat16), Rounding(torch.bfloat16)
    for start, end in ((0, 5), (5, 6), (6, 9)):
        logits, truth = (
            decoder(ids[:, start:end], mask=mask[:, start:end], cache=cache).logits
            for cache in (ours, by_hand)
        )
        assert_close(logits, truth)


# Forks


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORKED)
def test_each_row_of_a_fork_goes_on_as_a_copy_of_its_own(name, dtype):
    decoder, past, more = drawn(name), tokens(1, 13), tokens(3, 80)
    parent = read(decoder, past, dtype=dtype)
    for _ in range(2):  # a second fork finds the parent as it was
        fork, copies = parent.fork(3), read(decoder, past.expand(3, -1), dtype=dtype)
        for piece in more.split([2, 1, 60, 17], dim=1):  # more than the room it begins with
            ours, truth = (decoder(piece, cache=cache).logits for cache in (fork, copies))
            assert_close(ours, truth)
    assert parent.length == 13 and fork.length == 93
    ours = decoder(more[:1], cache=parent).logits  # and the parent goes on
    truth = decoder(more[:1], cache=read(decoder, past, dtype=dtype)).logits
    assert_close(ours, truth)


@pytest.mark.parametrize("name", FORKED)
def test_a_fork_stays_right_while_its_parent_goes_on(name):
    decoder, past, more = drawn(name), tokens(1, 13), tokens(2, 9)
    parent = read(decoder, past, capacity=14)
    fork = parent.fork(2)
    first = decoder(more[:, :3], cache=fork).logits
    decoder(tokens(1, 400), cache=parent)  # its buffers grow and move
    ours = torch.cat([first, decoder(more[:, 3:], cache=fork).logits], dim=1)
    assert_close(ours, decoder(torch.cat([past.expand(2, -1), more], dim=1)).logits[:, 13:])


@pytest.mark.parametrize("name", FORKED)
def test_some_places_of_a_fork_are_those_of_the_whole(name):
    decoder, past, more = drawn(name), tokens(1, 13), tokens(2, 9)
    fork = read(decoder, past).fork(2)
    decoder.hidden(more[:, :4], cache=fork, at=0)
    decoder.hidden(more[:, 4:5], cache=fork, at=0)
    ours = decoder.hidden(more[:, 5:], cache=fork, at=2).states
    whole = decoder.hidden(torch.cat([past.expand(2, -1), more], dim=1)).states
    assert_close(ours, whole[:, -2:])


def test_a_fork_shares_the_memory_of_what_layers_without_a_window_keep():
    decoder = drawn("long context")
    short, parent = (prefill(decoder, tokens(1, length)).cache for length in (30, 3000))
    assert parent.fork(50).nbytes == short.fork(50).nbytes
    shared = parent.fork(2).shared(2)
    assert shared is not None and shared[0].data_ptr() == parent.append(2, *new_tokens())[0].data_ptr()


def new_tokens() -> tuple[Tensor, Tensor]:
    """Keys and values of one token for a full layer."""
    return torch.zeros(1, 2, 1, 8, dtype=torch.float64), torch.zeros(1, 2, 1, 8, dtype=torch.float64)


def test_generation_continues_a_cache_and_its_forks():
    decoder, past, asked = drawn("long context"), tokens(1, 30), tokens(3, 4)
    parent = prefill(decoder, past).cache
    together = decoder.generate(asked, max_new_tokens=6, temperature=0, cache=parent.fork(3))
    for row in range(3):
        whole = torch.cat([past, asked[row : row + 1]], dim=1)
        alone = decoder.generate(whole, max_new_tokens=6, temperature=0)[:, 30:]
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(
        decoder.generate(asked[:1], max_new_tokens=6, temperature=0, cache=parent), together[:1]
    )
    assert parent.length == 30 + 4 + 5  # the last token drawn was not read


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_takes_the_likeliest_token_of_the_whole_pass(name):
    decoder, ids = drawn(name), tokens(2, 6)
    for _ in range(5):
        ids = torch.cat([ids, decoder(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(decoder.generate(ids[:, :6], max_new_tokens=5, temperature=0), ids)


# Refusals


def two_rows() -> KVCache:
    return read(drawn("long context"), tokens(2, 5))


def padded() -> KVCache:
    cache, ids = KVCache(), tokens(1, 5)
    drawn("long context")(ids, mask=torch.arange(5)[None] > 1, cache=cache)
    return cache


NO_FORK = {
    "nothing held": (KVCache, 2, "holds no token"),
    "several rows": (two_rows, 2, "2 rows.*must have one"),
    "several rows in windows": (lambda: read(drawn("window"), tokens(2, 5)), 2, "2 rows.*must have one"),
    "padding": (padded, 2, "padding"),
    "a fork": (lambda: read(drawn("long context"), tokens(1, 5)).fork(2), 2, "is a fork"),
    "a fork of one row": (lambda: read(drawn("window"), tokens(1, 5)).fork(1), 1, "is a fork"),
    "no rows": (lambda: read(drawn("long context"), tokens(1, 5)), 0, "rows=0 must be at least 1"),
}


@pytest.mark.parametrize("case", NO_FORK)
def test_what_cannot_be_forked_is_refused(case):
    make, rows, message = NO_FORK[case]
    with pytest.raises(ValueError, match=message):
        make().fork(rows)


def test_a_fork_takes_no_padding_and_no_other_number_of_rows():
    decoder = drawn("long context")
    parent = read(decoder, tokens(1, 5))
    mask = torch.tensor([[True, True], [False, True]])
    with pytest.raises(ValueError, match="take no padding"):
        decoder(tokens(2, 2), mask=mask, cache=parent.fork(2))
    with pytest.raises(ValueError, match="batch"):
        decoder(tokens(3, 2), cache=parent.fork(2))
    with pytest.raises(ValueError, match="batch"):
        decoder(tokens(2, 2), cache=parent)


OTHER_MODELS = {
    "other heads": {"num_key_value_heads": 1},
    "another width": {"hidden_size": 32},
    "more layers": {
        "num_hidden_layers": 4,
        "layer_types": "LLGL",
        "no_rope_layers": (1,) * 4,
        "canon_set": ("AC", "AC", "AB", ""),
    },
    "another window": {"sliding_window": 5},
    "a window elsewhere": {"layer_types": "GLL", "attention_init": "normal"},
    "no windows": {"layer_types": None, "sliding_window": None, "canon_set": ("AB",) * 3},
    "more convolutions": {"canon_set": ("AC", "ABC", "AB")},
    "longer convolutions": {"canon_kernel": 6},
    "shorter convolutions": {"canon_kernel": 2},
    "latents": LATENT_LONG
    | {"attention_init": "normal", "use_ssmax": False, "use_qk_norm": False}
    | {"no_rope_layers": None},
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_the_cache_of_another_model_is_refused(case):
    other = Decoder(replace(BASE, **(LONG | OTHER_MODELS[case]))).double().eval()
    cache = read(drawn("long context"), tokens(2, 9))
    with pytest.raises(ValueError, match="Use a new KVCache"):
        other(tokens(2, 1), cache=cache)


def test_another_batch_dtype_or_gradients_are_refused():
    decoder = drawn("long context")
    cache = read(decoder, tokens(2, 9))
    with pytest.raises(ValueError, match=r"batch of 2, got 3|batch.*\(2,.*\(3"):
        decoder(tokens(3, 1), cache=cache)
    with pytest.raises(ValueError, match=r"batch of 1, got 3"):
        decoder(tokens(3, 1), cache=padded())
    with pytest.raises(ValueError, match=r"torch\.float64.*torch\.float32"):
        decoder.float()(tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match="no gradients"), torch.enable_grad():
        decoder(tokens(2, 1), cache=KVCache())
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(ValueError, match="must be a floating-point type"):
            KVCache(dtype=dtype)
