"""Decoders for long context: the definition in loops, some places only, in every precision, compiled."""

import math
from dataclasses import replace

import pytest
import torch
from decoder_variants import BASE, LONG, VARIANTS, by_loops, drawn, tokens
from einops import einsum, rearrange, repeat
from torch import Tensor

from moe import Decoder
from moe.kv_cache import KVCache
from moe.losses import pointer_loss
from moe.rotary import Rotation
from moe.short_conv import ShortConv
from moe.sight import Sight
from moe.train.presets import PRESETS

DEFINED = [
    "no positions in one layer",
    "logits grow with the keys",
    "convolutions",
    "convolutions longer than the pieces",
    "sinks and windows",
    "long context",
    "long context of one key head",
    "long context of experts",
    "long context, full in the middle",
]


@pytest.mark.parametrize("name", DEFINED)
def test_a_decoder_is_its_definition_in_loops_in_value_and_gradients(name):
    decoder, ids = drawn(name), tokens(1, 9)
    ours, truth = decoder(ids).logits[0], by_loops(decoder, ids[0].tolist())
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(truth)
    parameters = dict(decoder.named_parameters())
    gradients = (torch.autograd.grad(y, list(parameters.values()), upstream) for y in (ours, truth))
    for key, our, true in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(our, true, rtol=1e-8, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


# Some places only

RAISES_ON_TENSORS = [name for name, changes in VARIANTS.items() if "C" in changes.get("canon_set", ("",))[-1]]
PLACES = torch.tensor([[0, 3, 7, 10], [1, 2, 9, 10]])


def left_padded(ids: Tensor) -> Tensor:
    """A mask (b s) with four places of padding before the first row."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :4] = False
    return mask


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_last_places_alone_are_those_of_the_whole_pass_in_value_and_gradients(name, padding):
    decoder, ids = drawn(name), tokens()
    mask = left_padded(ids) if padding else None
    parameters = list(decoder.parameters())
    whole = decoder.hidden(ids, mask=mask)
    for at in (0, 1, 30):  # also more than there are
        some = decoder.hidden(ids, mask=mask, at=at).states
        torch.testing.assert_close(some, whole.states[:, max(11 - at, 0) :], rtol=1e-9, atol=1e-9)
    some = decoder.hidden(ids, mask=mask, at=3)
    assert_same_pass(some.states, whole.states[:, -3:], parameters)
    assert_same_pass(some.attended.queries, whole.attended.queries[:, :, -3:], parameters)
    assert_same_pass(some.attended.out, whole.attended.out[:, -3:], parameters)
    assert torch.equal(some.attended.keys, whole.attended.keys)


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in RAISES_ON_TENSORS])
def test_places_of_each_row_are_those_of_the_whole_pass_in_value_and_gradients(name, padding):
    decoder, ids = drawn(name), tokens()
    mask = left_padded(ids) if padding else None
    parameters = list(decoder.parameters())
    whole = decoder.hidden(ids, mask=mask)
    some = decoder.hidden(ids, mask=mask, at=PLACES)
    rows = torch.arange(2)[:, None]
    assert_same_pass(some.states, whole.states[rows, PLACES], parameters)
    queries = whole.attended.queries.transpose(1, 2)[rows, PLACES].transpose(1, 2)
    assert_same_pass(some.attended.queries, queries, parameters)
    assert len(some.routings) == len(whole.routings)


def assert_same_pass(ours: Tensor, truth: Tensor, parameters: list) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(truth)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    gradients = (torch.autograd.grad(x, parameters, upstream, **options) for x in (ours, truth))
    for our, true in zip(*gradients, strict=True):
        torch.testing.assert_close(our, true, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["logits grow with the keys", "multipliers", "norm over all heads"])
def test_attention_is_the_softmax_of_the_products_that_it_reports(name):
    decoder, ids, taken = drawn(name), tokens(), {}
    layer = decoder.model.layers[2].self_attn
    layer.v_proj.register_forward_hook(lambda module, x, values: taken.update(values=values))
    layer.o_proj.register_forward_hook(lambda module, x, y: taken.update(mixed=x[0], out=y))
    attended = decoder.hidden(ids).attended
    keys, values = (
        repeat(x, "b g l c -> b (g r) l c", r=3)
        for x in (attended.keys, rearrange(taken["values"], "b l (g c) -> b g l c", g=2))
    )
    if decoder.config.clip_qkv is not None:
        values = values.clamp(-decoder.config.clip_qkv, decoder.config.clip_qkv)
    unseen = torch.ones(11, 11, dtype=torch.bool).triu(1)
    weights = (attended.queries @ keys.mT).masked_fill(unseen, -torch.inf).softmax(-1)
    mixed = rearrange(weights @ values, "b n s c -> b s (n c)")
    torch.testing.assert_close(taken["mixed"], mixed, rtol=1e-9, atol=1e-9)
    assert torch.equal(attended.out, taken["out"])


@pytest.mark.parametrize("name", RAISES_ON_TENSORS)
def test_places_of_each_row_are_refused_where_a_convolution_reads_their_neighbours(name):
    with pytest.raises(ValueError, match=r"C in canon_set.*give a number of last places"):
        drawn(name).hidden(tokens(), at=PLACES)


BAD_PLACES = {
    "a negative number": (-1, "at=-1 must be at least 0"),
    "another batch": (torch.zeros(3, 1, dtype=torch.int64), r"\(b m\) with b=2, got \(3, 1\)"),
    "one axis": (torch.zeros(2, dtype=torch.int64), r"\(b m\) with b=2, got \(2,\)"),
    "another dtype": (torch.zeros(2, 1, dtype=torch.int32), "int64.*int32"),
    "a place too far": (torch.tensor([[0], [11]]), "places 0 to 11, but there are 11"),
    "a place before the first": (torch.tensor([[0], [-1]]), "places -1 to 0, but there are 11"),
}


@pytest.mark.parametrize("case", BAD_PLACES)
def test_places_that_are_not_there_are_refused(case):
    at, message = BAD_PLACES[case]
    with pytest.raises(ValueError, match=message):
        drawn("long context").hidden(tokens(), at=at)


def test_places_of_each_row_are_refused_with_a_cache():
    with pytest.raises(ValueError, match="with a cache, give a number of last places"), torch.no_grad():
        drawn("long context").hidden(tokens(), at=PLACES, cache=KVCache())


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_without_any_place_fill_a_cache_as_a_whole_pass_does(name, padding):
    decoder, ids = drawn(name), tokens(length=14)
    mask = left_padded(ids) if padding else torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        truth = decoder(ids, mask=mask if padding else None)
        for sizes, at in (([4, 1, 2, 5, 2], 2), ([13, 1], 1), ([2, 12], 3)):
            cache = KVCache(capacity=3)
            parts = list(zip(ids.split(sizes, dim=1), mask.split(sizes, dim=1), strict=True))
            for piece, real in parts[:-1]:
                given = real if padding else None
                nothing = decoder.hidden(piece, mask=given, cache=cache, at=0)
                assert nothing.states.shape == (2, 0, decoder.config.hidden_size)
            piece, real = parts[-1]
            last = decoder.hidden(piece, mask=real if padding else None, cache=cache, at=at).states
            torch.testing.assert_close(last, truth.hidden[:, -at:], rtol=1e-9, atol=1e-9)
            more = decoder(tokens(length=3)[:, :3], cache=cache).logits
            whole_ids = torch.cat([ids, tokens(length=3)], dim=1)
            whole_mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.bool)], dim=1)
            whole = decoder(whole_ids, mask=whole_mask).logits[:, -3:]
            torch.testing.assert_close(more, whole, rtol=1e-9, atol=1e-9)


FULL = [name for name, changes in VARIANTS.items() if "sliding_window" not in changes]


@pytest.mark.parametrize("places", [None, 0, 1], ids=["all places", "no places", "one place"])
@pytest.mark.parametrize("name", FULL)  # a window counts the places of padding
def test_prompts_padded_on_either_side_go_on_as_if_each_were_alone(name, places):
    decoder, ids, more = drawn(name), tokens(4, 12), tokens(4, 4)
    spans = [(0, 12), (0, 5), (0, 1), (3, 9)]
    mask = torch.stack([(torch.arange(12) >= first) & (torch.arange(12) < end) for first, end in spans])
    cache = KVCache()
    with torch.no_grad():
        decoder.hidden(ids, mask=mask, cache=cache, at=places)
        parts = [decoder(piece, cache=cache).logits for piece in more.split([1, 3], dim=1)]
        for row, (first, end) in enumerate(spans):
            alone = torch.cat([ids[row, first:end], more[row]])[None]
            torch.testing.assert_close(
                torch.cat(parts, dim=1)[row], decoder(alone).logits[0, -4:], rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("name", ["window", "window in some layers", "sinks and windows"])
def test_a_window_over_padding_on_the_right_is_that_of_one_pass_over_all(name):
    decoder, ids = drawn(name), tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 5:8], mask[1, 2:8] = False, False  # the prompts are 8 places, padding included
    cache = KVCache()
    with torch.no_grad():
        decoder.hidden(ids[:, :8], mask=mask[:, :8], cache=cache, at=0)
        parts = [decoder(piece, cache=cache).logits for piece in ids[:, 8:].split([1, 3], dim=1)]
        whole = decoder(ids, mask=mask).logits[:, 8:]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


# Precision, compilation, initialisation

TRAINED = ["long context", "long context of one key head", "long context of experts"]


def test_the_loss_compiles_as_one_graph():
    decoder, ids = drawn("long context of experts").float(), tokens(length=12)
    mask = left_padded(ids)
    compiled = torch.compile(decoder.loss, fullgraph=True, backend="eager")
    ours, truth = (loss(ids, ids, mask=mask).total for loss in (compiled, decoder.loss))
    torch.testing.assert_close(ours, truth)
    parameters = list(decoder.parameters())
    gradients = (torch.autograd.grad(loss, parameters) for loss in (ours, truth))
    for our, true in zip(*gradients, strict=True):
        torch.testing.assert_close(our, true, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_autocast_trains_float32_weights(name):
    decoder, ids = drawn(name).float(), tokens(length=12)
    truth = decoder.loss(ids, ids).total
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder.loss(ids, ids).total
    loss.backward()
    torch.testing.assert_close(loss, truth, rtol=0.05, atol=0)
    for key, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_weights_give_the_logits_of_wide_ones_up_to_rounding(name, dtype):
    narrow, ids = drawn(name).to(dtype), tokens(length=12)
    wide = drawn(name)
    wide.load_state_dict({key: value.double() for key, value in narrow.state_dict().items()})
    with torch.no_grad():
        ours, truth = narrow(ids).logits, wide(ids).logits
        cache = KVCache()
        pieces = [narrow(piece, cache=cache).logits for piece in ids.split([5, 1, 6], dim=1)]
    assert ours.dtype == dtype
    for logits in (ours, torch.cat(pieces, dim=1)):
        error = (logits.double() - truth).abs().mean() / truth.abs().mean()
        assert error < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", TRAINED)
def test_layers_that_are_computed_again_give_the_same_places_and_gradients(name):
    decoder, ids = drawn(name), tokens()
    mask = left_padded(ids)
    passes = []
    for decoder.checkpoint_blocks in (False, True):
        hidden = decoder.hidden(ids, mask=mask, at=PLACES)
        loss = pointer_loss(hidden.attended.queries, hidden.attended.keys, PLACES, PLACES // 2)
        passes.append(torch.cat([hidden.states.flatten(), loss[None]]))
    assert_same_pass(passes[1], passes[0], list(decoder.parameters()))


def test_new_parameters_begin_as_documented():
    config = replace(BASE, **LONG, max_position_embeddings=100, embedding_initializer_range=0.7)
    decoder = Decoder(replace(config, vocab_size=2000))
    last = decoder.model.layers[2].self_attn
    torch.testing.assert_close(last.ssmax * math.log(100), torch.ones(6))  # at the trained length, no change
    assert decoder.model.embed_tokens.weight.std().item() == pytest.approx(0.7, rel=0.02)
    convs = [module for module in decoder.modules() if isinstance(module, ShortConv)]
    taps = torch.cat([module.weight.detach().flatten() for module in convs if module is not last.k_conv])
    assert len(convs) == 8 and taps.std().item() == pytest.approx(0.1, rel=0.1) and abs(taps.mean()) < 0.02
    shift = last.k_conv.weight.mean(1)  # x_(t-1) instead of x_t
    torch.testing.assert_close(shift, torch.tensor([-1.0, 1, 0, 0]), rtol=0, atol=0.1)
    keys = last.k_proj.weight.unflatten(0, (2, 1, 8)).expand(2, 3, 8, 24).flatten(0, 2)
    assert torch.equal(last.q_proj.weight, keys)
    local = decoder.model.layers[0].self_attn
    assert local.ssmax is None and local.k_conv is None
    assert not torch.equal(local.q_proj.weight[:8], local.k_proj.weight[:8])


def attention_to_what_came_next(init: str, seed: int) -> Tensor:
    """How much the last layer of an untrained model looks from a random segment that it has seen before at
    the token after the earlier occurrence of each of its tokens, (b n m), m of them.
    """
    torch.manual_seed(seed)
    decoder = Decoder(replace(PRESETS["needle"]().model, ssmax_power=1.0, attention_init=init))
    segment, other = torch.randint(256, (4, 24)), torch.randint(256, (4, 200))
    ids = torch.cat([other[:, :60], segment, other[:, 60:], segment], dim=1)
    with torch.no_grad():
        attended = decoder.hidden(ids).attended
    logits = einsum(attended.queries, attended.keys[:, 0], "b n s c, b l c -> b n s l")
    unseen = torch.ones(logits.shape[2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(unseen, -torch.inf).softmax(-1)
    places = torch.arange(ids.shape[1] - 16, ids.shape[1] - 1)  # with enough of the segment before them
    return weights[:, :, places, places - 164 + 1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_untrained_model_that_begins_as_an_induction_head_finds_what_came_next(seed):
    ready, normal = (attention_to_what_came_next(init, seed) for init in ("induction", "normal"))
    assert (ready > 0.5).float().mean() > 0.5 and ready.mean() > 0.4  # most of 248 places
    assert normal.mean() < 0.02


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (2, 1)])
def test_a_sliding_layer_that_begins_as_a_copy_gives_back_what_it_sees(heads):
    """With a window of one token that is the token itself, once, up to noise in other directions."""
    model = PRESETS["needle"]().model
    changes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "sliding_window": 1}
    x, copied = torch.randn(1, 500, model.hidden_size), []
    for init in ("copying", "induction"):
        decoder = Decoder(replace(model, **changes, attention_init=init))
        sight = Sight.causal((1, 500), x.device, None, None, 1)
        out = decoder.model.layers[0].self_attn(x, sight, Rotation.at(sight.positions, 64, 1e4, x.dtype)).out
        copied.append(((out * x).sum() / x.square().sum()).item())
    assert copied[0] == pytest.approx(1, abs=0.1) and abs(copied[1]) < 0.1
