"""Attention, its rotary embedding and its cache, against definitions in float64."""

import math

import pytest
import torch
from einops import einsum, rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import Decoder
from moe.attend import attend
from moe.attention import GroupedQueryAttention, RMSNorm
from moe.decoder_config import DecoderConfig
from moe.kv_cache import KVCache
from moe.rotary import RopeScaling, Rotation
from moe.sight import Sight


def config(**changes) -> DecoderConfig:
    sizes = {
        "vocab_size": 11,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 8,
    }
    return DecoderConfig(**(sizes | changes))


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter from N(0, 1), so that no two are alike, in float64."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.double()


def attention_definition(attention: GroupedQueryAttention, x: Tensor, n: int, g: int, theta: float) -> Tensor:
    """One query at a time, one head at a time, keys turned as complex numbers."""
    c = attention.head_size
    q, k, v = (
        rearrange(x @ p.weight.T, "b s (n c) -> b n s c", c=c)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if attention.q_norm is not None:
        q = q / (q.square().mean(-1, keepdim=True) + attention.q_norm.eps).sqrt() * attention.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + attention.k_norm.eps).sqrt() * attention.k_norm.weight

    def turn(x: Tensor) -> Tensor:
        angles = torch.outer(
            torch.arange(x.shape[2]).double(), theta ** (-torch.arange(0, c, 2).double() / c)
        )
        turned = torch.complex(x[..., : c // 2], x[..., c // 2 :]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([turned.real, turned.imag], dim=-1)

    q, k = turn(q), turn(k)
    out = torch.zeros_like(q)
    for head in range(n):
        for query in range(x.shape[1]):
            keys, values = k[:, head * g // n, : query + 1], v[:, head * g // n, : query + 1]
            weights = (einsum(q[:, head, query], keys, "b c, b l c -> b l") / math.sqrt(c)).softmax(-1)
            out[:, head, query] = einsum(weights, values, "b l, b l c -> b c")
    return rearrange(out, "b n s c -> b s (n c)") @ attention.o_proj.weight.T


def causal(x: Tensor, c: int, theta: float) -> tuple[Sight, Rotation]:
    sight = Sight.causal((x.shape[0], x.shape[1]), x.device, None, None)
    return sight, Rotation.at(sight.positions, c, theta, x.dtype)


@pytest.mark.parametrize(
    "heads", [(6, 6), (6, 2), (6, 1)], ids=["each its own", "groups of 3", "one key head"]
)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "q/k norm"])
def test_attention_equals_its_definition_in_value_and_gradient(heads, qk_norm):
    n, g = heads
    settings = config(num_attention_heads=n, num_key_value_heads=g, use_qk_norm=qk_norm, rope_theta=100.0)
    attention = drawn(GroupedQueryAttention(settings, 0))
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    ours = attention(x, *causal(x, 4, 100.0)).out
    truth = attention_definition(attention, x, n, g, 100.0)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    leaves = [x, *attention.parameters()]
    probe = torch.randn_like(ours)
    for ours_grad, truth_grad in zip(
        torch.autograd.grad((ours * probe).sum(), leaves),
        torch.autograd.grad((truth * probe).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, truth_grad, rtol=1e-9, atol=1e-9)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys():
    attention = drawn(GroupedQueryAttention(config(use_qk_norm=True, rms_norm_eps=1e-12), 0))
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    before = attention(x, *causal(x, 4, 10000.0)).out
    with torch.no_grad():
        attention.q_proj.weight.mul_(7)
        attention.k_proj.weight.mul_(0.3)
    torch.testing.assert_close(attention(x, *causal(x, 4, 10000.0)).out, before)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 3000))
def test_rotary_products_depend_on_the_distance_alone(query_at, key_at, shift):
    generator = torch.Generator().manual_seed(query_at)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def product(i: int, j: int) -> Tensor:
        turned = (Rotation.at(torch.tensor([[at]]), 8, 10000.0, torch.float64) for at in (i, j))
        return torch.stack([turn(x) for turn, x in zip(turned, (q, k), strict=True)]).prod(0).sum()

    torch.testing.assert_close(product(query_at, key_at), product(query_at + shift, key_at + shift))


def test_rotary_has_no_last_position():
    far = Rotation.at(torch.tensor([[10_000_000, 10_000_001]]), 8, 10000.0, torch.float64)
    torch.testing.assert_close(far.cos[0, :, 0], torch.tensor([1e7, 1e7 + 1], dtype=torch.float64).cos())


FAR = 10_000_000


@pytest.mark.parametrize("scaling", [None, RopeScaling(rope_type="yarn", factor=8.0)], ids=["plain", "yarn"])
@pytest.mark.parametrize("theta", [1000.0, 10000.0, 1e6])
def test_far_away_products_still_depend_on_the_distance_alone(theta, scaling):
    query, key = torch.randn(2, 1, 1, 64, 16)
    for distance in (1, 7, 31, 4000):
        near, far = (
            products(query, key, start, distance, theta, reach=FAR + 5000, scaling=scaling)
            for start in (0, FAR)
        )
        torch.testing.assert_close(far, near, rtol=0, atol=1e-5)
    in_float32 = products(query, key, FAR, 1, theta, reach=0, scaling=scaling)
    assert (in_float32 - products(query, key, 0, 1, theta, reach=0, scaling=scaling)).abs().max() > 1e-3


def products(
    query: Tensor, key: Tensor, start: int, distance: int, theta: float, *, reach: int, scaling
) -> Tensor:
    """q . k at places `start + distance` and `start`, for each of many (1 1 s c) vectors."""
    options = {"scaling": scaling, "max_position_embeddings": 2048, "reach": reach}
    at, there = (
        Rotation.at(torch.full((1, 64), place), 16, theta, **options)(x)
        for place, x in ((start + distance, query / 4), (start, key / 4))
    )
    return (at * there).sum(-1)


def test_below_65536_places_turn_by_the_same_bits_whatever_the_reach():
    positions = torch.arange(0, 65_536, 97)[None]
    plain = Rotation.at(positions, 16, 10000.0)
    angles = positions[..., None].float() * (1 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16))
    assert torch.equal(plain.cos, angles.cos()) and torch.equal(plain.sin, angles.sin())
    within = Rotation.at(positions, 16, 10000.0, reach=65_536)
    assert torch.equal(within.cos, plain.cos) and torch.equal(within.sin, plain.sin)
    beyond = Rotation.at(positions, 16, 10000.0, reach=65_537)
    assert beyond.cos.dtype == torch.float32 and not torch.equal(beyond.cos, plain.cos)


def test_a_decoder_says_how_far_its_positions_reach(monkeypatch):
    reaches, at = [], Rotation.at
    monkeypatch.setattr(Rotation, "at", lambda *x, reach, **more: reaches.append(reach) or at(*x, **more))
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    decoder, cache = Decoder(DecoderConfig(num_hidden_layers=1, **sizes)), KVCache()
    with torch.no_grad():
        for length in (5, 1, 3):
            decoder(torch.zeros(1, length, dtype=torch.int64), cache=cache)
    assert reaches == [5, 6, 9]


def test_rotary_turns_bfloat16_in_float32():
    x = torch.randn(1, 1, 300, 8)
    rotation = Rotation.at(torch.arange(300)[None], 8, 10000.0, torch.bfloat16)
    assert rotation.cos.dtype == torch.float32
    torch.testing.assert_close(
        rotation(x.bfloat16()), rotation(x.bfloat16().float()).bfloat16(), rtol=0, atol=0
    )


def test_rms_norm_of_bfloat16_errs_by_rounding_the_result_alone():
    norm = RMSNorm(64, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(50, 64).bfloat16()
    wide = x.double()
    weight = norm.weight.bfloat16().double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    ours = norm.bfloat16()(x)
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - truth).abs() <= 2**-8 * truth.abs() * 1.001).all()


def test_padding_is_seen_by_no_real_token_and_empty_rows_are_finite():
    mask = torch.tensor([[False, False, True, True], [True, True, False, True], [False] * 4])
    sight = Sight.causal((3, 4), mask.device, mask, None)
    assert sight.positions.tolist() == [[0, 0, 0, 1], [0, 1, 1, 2], [0, 0, 0, 0]]
    seen_by_real = sight.allowed[:, 0] & mask[:, :, None]
    assert not (seen_by_real & ~mask[:, None, :]).any()
    assert sight.allowed.any(-1).all()  # an empty row is NaN in some attention kernels
    x = torch.randn(3, 2, 4, 8, requires_grad=True)
    out = attend(x, x, x, sight)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_a_growing_cache_returns_everything_appended():
    cache = KVCache(capacity=2)
    keys = torch.randn(3, 2, 11, 4)
    for start, end in [(0, 1), (1, 4), (4, 5), (5, 11)]:
        for layer in range(2):
            k, v = cache.append(layer, keys[:, :, start:end], layer - keys[:, :, start:end])
            assert torch.equal(k, keys[:, :, :end]) and torch.equal(v, layer - keys[:, :, :end])
        cache.advance(end - start, None)
    assert cache.length == 11 and cache.seen is None


def test_a_failed_pass_leaves_the_cache_as_it_was():
    cache = KVCache()
    first, second, wrong = torch.randn(3, 1, 2, 3, 4)
    cache.append(0, first, first)
    cache.advance(3, None)
    cache.append(0, wrong, wrong)  # the pass stops here: no advance
    keys, _ = cache.append(0, second, second)
    assert torch.equal(keys, torch.cat([first, second], dim=2))


def filled_cache() -> KVCache:
    cache = KVCache()
    cache.append(0, torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4))
    cache.advance(3, None)
    return cache


@pytest.mark.parametrize(
    ("keys", "layer", "message"),
    [
        (torch.zeros(5, 2, 1, 4), 0, r"got \(5, 2, 4"),
        (torch.zeros(2, 1, 1, 4), 0, r"got \(2, 1, 4"),
        (torch.zeros(2, 2, 1, 4, dtype=torch.float64), 0, "float64"),
        (torch.zeros(2, 2, 1, 4), 1, "a model of 1 layers"),
        (torch.zeros(2, 2, 1, 4, requires_grad=True), 0, "no_grad"),
    ],
    ids=["batch", "heads", "dtype", "layers", "gradient"],
)
def test_a_cache_refuses_what_does_not_continue_it(keys, layer, message):
    with pytest.raises(ValueError, match=message):
        filled_cache().append(layer, keys, keys)


def test_a_cache_needs_room():
    with pytest.raises(ValueError, match="capacity=0"):
        KVCache(capacity=0)
