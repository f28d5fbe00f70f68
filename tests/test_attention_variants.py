"""Windows, sinks, norms, rotary variants and latents: against definitions in float64, and with a cache."""

import math
from dataclasses import replace

import pytest
import torch
from decoder_variants import BASE, LATENT, VARIANTS, drawn, tokens
from einops import einsum, rearrange, repeat
from torch import Tensor

from moe import Decoder, DecoderConfig, count_parameters, flops_per_token
from moe.attend import attend
from moe.kv_cache import KVCache
from moe.rotary import RopeScaling, Rotation
from moe.sight import Sight


@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_and_in_pieces_are_the_whole_at_once(name):
    decoder, ids = drawn(name), tokens()
    with torch.no_grad():
        whole = decoder(ids).logits
        for sizes in ([1] * 11, [4, 1, 5, 1], [7, 4]):
            cache = KVCache(capacity=2)
            pieces = [decoder(piece, cache=cache).logits for piece in ids.split(sizes, dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_on_the_left_changes_nothing(name):
    decoder, ids = drawn(name), tokens(1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
    mask = torch.arange(16)[None] >= 5
    with torch.no_grad():
        torch.testing.assert_close(decoder(padded, mask=mask).logits[:, 5:], decoder(ids).logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_parameters_that_are_counted_are_those_that_exist(name):
    decoder = drawn(name)
    assert count_parameters(decoder.config).total == sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_gradient(name):
    decoder, ids = drawn(name), tokens()
    decoder.loss(ids[:, :-1], ids[:, 1:]).total.backward()
    for key, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


def definition(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: Tensor | None, scale: float) -> Tensor:
    """Query by query: the softmax over the keys of the window and the sink, times the values alone."""
    out, groups = [], q.shape[1] // k.shape[1]
    k, v = (repeat(x, "b g l c -> b (g r) l c", r=groups) for x in (k, v))
    for query in range(q.shape[2]):
        seen = slice(max(0, query - window + 1), query + 1)
        scores = einsum(q[:, :, query], k[:, :, seen], "b n c, b n l c -> b n l") * scale
        weights = scores.exp()
        total = weights.sum(-1) + (0 if sinks is None else sinks.exp())
        out.append(einsum(weights, v[:, :, seen], "b n l, b n l c -> b n c") / total[..., None])
    return rearrange(out, "s b n c -> b n s c")


@pytest.mark.parametrize("has_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("value_size", [8, 5])
def test_attention_with_windows_and_sinks_is_its_definition(window, has_sinks, value_size):
    torch.manual_seed(window)
    q, k = torch.randn(2, 6, 9, 8, dtype=torch.float64), torch.randn(2, 2, 9, 8, dtype=torch.float64)
    v, sinks = torch.randn(2, 2, 9, value_size, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    leaves = [q, k, v, *([sinks] if has_sinks else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    given = sinks if has_sinks else None
    sight = Sight.causal((2, 9), q.device, None, None, window)
    ours, truth = attend(q, k, v, sight, scale=0.4, sinks=given), definition(q, k, v, window, given, 0.4)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(truth)
    for our, true in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(truth, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(our, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("has_sinks", [False, True], ids=["no sinks", "sinks"])
def test_each_input_of_attention_alone_has_the_gradient_that_it_has_among_all(has_sinks, monkeypatch):
    monkeypatch.setattr(
        "moe.attend.MASK_BYTES", 1
    )  # so that keys are read in blocks where nobody differentiates
    q, k, v = (torch.randn(2, n, s, 8, dtype=torch.float64) for n, s in ((6, 4), (2, 9), (2, 9)))
    leaves = [q, k, v, *([torch.randn(6, dtype=torch.float64)] if has_sinks else [])]
    sight, upstream = Sight(torch.arange(5, 9)[None]), torch.randn(2, 6, 4, 8, dtype=torch.float64)

    def gradients(wanted: list[int]) -> list[Tensor]:
        given = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
        out = attend(*given[:3], sight, sinks=given[3] if has_sinks else None)
        return list(torch.autograd.grad(out, [given[i] for i in wanted], upstream))

    together = gradients(list(range(len(leaves))))
    for i, expected in enumerate(together):
        torch.testing.assert_close(gradients([i])[0], expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        blocks = attend(*leaves[:3], sight, sinks=leaves[3] if has_sinks else None)
    q.requires_grad_()
    torch.testing.assert_close(blocks, attend(*leaves[:3], sight, sinks=leaves[3] if has_sinks else None))


def test_a_huge_sink_takes_all_the_weight_and_stays_finite():
    x = torch.randn(1, 2, 4, 8)
    sight = Sight.causal((1, 4), x.device, None, None)
    assert attend(x, x, x, sight, sinks=torch.full((2,), 1e4)).abs().max() == 0
    without = attend(x, x, x, sight)
    torch.testing.assert_close(attend(x, x, x, sight, sinks=torch.full((2,), -1e4)), without)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_pairs_turn_as_complex_numbers_do(interleaved):
    x, positions = torch.randn(2, 3, 5, 10, dtype=torch.float64), torch.arange(5)[None] + 7
    ours = Rotation.at(positions, 6, 50.0, torch.float64, interleaved=interleaved)(x)
    left, right = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., 0:3], x[..., 3:6])
    angles = positions[..., None].double() / 50.0 ** (torch.arange(0, 6, 2).double() / 6)
    turned = torch.complex(left, right) * torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = (turned.real, turned.imag)
    expected = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    torch.testing.assert_close(ours, torch.cat([expected, x[..., 6:]], -1))


def test_a_window_costs_less_and_latents_cost_what_their_matrices_do():
    assert flops_per_token(BASE, 100) > flops_per_token(replace(BASE, sliding_window=10), 100)
    seen = (10 * 11 / 2 + 90 * 10) / 100  # keys of a token on average
    difference = flops_per_token(BASE, 100) - flops_per_token(replace(BASE, sliding_window=10), 100)
    assert math.isclose(difference, 3 * 4 * 6 * 8 * (101 / 2 - seen))
    latent = replace(BASE, **LATENT)
    decoder = Decoder(latent)
    matrices = sum(p.numel() for p in decoder.parameters() if p.dim() == 2)  # the tied embedding is the head
    assert flops_per_token(latent, 1) == 2 * matrices + 3 * 2 * 6 * (10 + 5)


NONSENSE = {
    "a kind of layer": (
        {"layer_types": ("local",) * 3, "sliding_window": 2},
        "must be one of",
    ),
    "too few kinds": ({"layer_types": ("full_attention",)}, "one for each of the 3 layers"),
    "no window": ({"layer_types": ("sliding_attention",) * 3}, "sliding_window is not set"),
    "an empty window": ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
    "a layer that is not there": ({"mlp_only_layers": (3,)}, "must be numbers of the 3 layers"),
    "an odd share": ({"partial_rotary_factor": 0.4}, "3 channels turn"),
    "sinks of latents": ({"kv_lora_rank": 8, "attention_sinks": True}, "latent attention has none"),
    "a way to norm": ({"qk_norm": "rows"}, r"qk_norm='rows' must be one of \['head', 'full'\]"),
    "a list for a table": ({"rope_scaling": [1]}, "must be a table"),
    "an unknown key": ({"rope_scaling": {"rope_type": "yarn", "fast": 1}}, "no key 'fast'"),
    "no type": ({"rope_scaling": {"factor": 2.0}}, "needs a rope_type"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
    "a factor below one": (
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        "must be at least 1",
    ),
    "no factors": ({"rope_scaling": {"rope_type": "longrope"}}, "needs short_factor and long_factor"),
    "a ramp upside down": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 5.0}},
        "must be below",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_settings_that_do_not_fit_together_are_refused(case):
    changes, message = NONSENSE[case]
    with pytest.raises(ValueError, match=message):
        replace(BASE, **changes)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_survives_json(name):
    config = replace(BASE, **VARIANTS[name])
    assert DecoderConfig.from_dict(config.to_dict()) == config


def test_rope_scaling_can_be_set_on_the_command_line():
    from moe.train.overrides import load_settings

    table = 'model.rope_scaling={rope_type = "yarn", factor = 4.0}'
    config = load_settings(
        "tiny", None, [table, "model.mlp_only_layers=[0]", "model.intermediate_size=16"]
    ).model
    assert config.rope_scaling == RopeScaling(rope_type="yarn", factor=4.0)
    assert config.mlp_only_layers == (0,) and not config.is_moe_layer(0)
