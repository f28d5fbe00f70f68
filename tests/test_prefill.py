"""Reading a prompt in pieces: the cache, the state and the next tokens of one whole forward pass."""

from dataclasses import replace

import pytest
import torch
from decoder_variants import BASE, EXPERTS, LATENT, LONG, drawn, tokens
from torch import Tensor

from moe import Decoder
from moe.kv_cache import KVCache
from moe.prefill import cache_bytes, describe_path, prefill

READ = ["long context", "long context of experts", "long context, full in the middle", "sinks"]
READ += ["latents and convolutions", "convolutions longer than the pieces"]
EARLY = "early exit: keys and values alone in the last layer"


def assert_close(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("every_place", [False, True], ids=["early exit", "every place"])
@pytest.mark.parametrize("name", READ)
def test_a_prompt_read_in_pieces_is_one_forward_pass(name, every_place):
    decoder, ids, more = drawn(name), tokens(2, 17), tokens(2, 5)
    with torch.no_grad():
        whole = decoder(torch.cat([ids, more], dim=1))
        for chunk in (1, 3, 7, 17, 100):
            read = prefill(decoder, ids, chunk=chunk, every_place=every_place)
            assert_close(read.state, whole.hidden[:, 16])
            assert_close(decoder.logits(read.state), whole.logits[:, 16])
            assert read.cache.length == 17 and read.seconds > 0
            after = [decoder(piece, cache=read.cache).logits for piece in more.split([1, 4], dim=1)]
            assert_close(torch.cat(after, dim=1), whole.logits[:, 17:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_ids_may_be_of_any_integer_dtype(dtype):
    decoder, ids = drawn("long context"), tokens(2, 17)
    assert torch.equal(prefill(decoder, ids.to(dtype), chunk=5).state, prefill(decoder, ids, chunk=5).state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", READ)
def test_a_prompt_kept_in_few_bits_is_one_read_into_such_a_cache(name, dtype):
    decoder, ids, more = drawn(name), tokens(1, 17), tokens(1, 5)
    cache = KVCache(dtype=dtype)
    with torch.no_grad():
        parts = [decoder(piece, cache=cache).hidden for piece in ids.split(7, dim=1)]
        read = prefill(decoder, ids, chunk=7, dtype=dtype)
        saved = prefill(decoder, ids).cache.nbytes - read.cache.nbytes
        assert_close(read.state, parts[-1][:, -1])
        assert_close(decoder(more, cache=read.cache).logits, decoder(more, cache=cache).logits)
    assert saved == cache_bytes(decoder.config, 18, torch.float64) - cache_bytes(decoder.config, 18, dtype)


PATHS = {
    "one full layer, the last": (LONG, f"{EARLY}; cost linear in the length"),
    "a full layer in the middle": (
        LONG | {"layer_types": "LGL", "attention_init": "normal"},
        f"{EARLY}; all pairs of places in layers [1]",
    ),
    "all full": ({}, f"{EARLY}; all pairs of places in layers [0, 1]"),
    "all windows": ({"sliding_window": 4}, f"{EARLY}; cost linear in the length"),
}


@pytest.mark.parametrize("case", PATHS)
def test_a_prefill_says_which_way_it_took(case):
    changes, words = PATHS[case]
    config = replace(BASE, **changes)
    assert describe_path(config) == words
    decoder = Decoder(config)
    assert prefill(decoder, tokens(1, 4)).path == words
    everywhere = prefill(decoder, tokens(1, 4), every_place=True).path
    full = [layer for layer in range(3) if config.window(layer) is None]
    cost = f"all pairs of places in layers {full}" if full else "cost linear in the length"
    assert everywhere == f"every place of every layer; {cost}"


@pytest.mark.parametrize("changes", [LONG, LONG | EXPERTS, LATENT], ids=["dense", "experts", "latents"])
def test_the_early_exit_computes_keys_and_values_alone_in_the_last_layer(changes):
    decoder, seen = Decoder(replace(BASE, **changes)), []
    decoder.model.layers[2].mlp.register_forward_hook(lambda layer, x, y: seen.append(x[0].shape[1]))
    prefill(decoder, tokens(1, 20), chunk=6)
    assert seen == [0, 0, 0, 1]


def test_progress_tells_how_far_the_prompt_is_read():
    told = []
    prefill(drawn("long context"), tokens(1, 17), chunk=7, progress=lambda *facts: told.append(facts))
    assert [facts[:2] for facts in told] == [(7, 17), (14, 17), (17, 17)]
    seconds = [facts[2] for facts in told]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopped_half_way_the_decoder_is_as_before(error):
    decoder, ids = drawn("long context of experts"), tokens(1, 17)
    decoder.train()
    decoder.model.layers[1].eval()
    modes = [module.training for module in decoder.modules()]
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    truth = prefill(decoder, ids).state

    def stop(done: int, total: int, seconds: float) -> None:
        assert not any(module.training for module in decoder.modules())
        if done > 7:
            raise error

    with pytest.raises(error):
        prefill(decoder, ids, chunk=7, progress=stop)
    assert [module.training for module in decoder.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())
    assert torch.equal(prefill(decoder, ids).state, truth) and torch.is_grad_enabled()


BAD = {
    "no token": (torch.zeros(1, 0, dtype=torch.int64), {}, r"at least one token, got shape \(1, 0\)"),
    "one axis": (torch.zeros(5, dtype=torch.int64), {}, r"prompts \(b s\).*got shape \(5,\)"),
    "an id outside": (torch.tensor([[3, 23]]), {}, "id 23 is outside the vocabulary"),
    "a negative id": (torch.tensor([[3, -1]], dtype=torch.int8), {}, "id -1 is outside the vocabulary"),
    "broken numbers": (torch.tensor([[3.5, 1.0]]), {}, "float32"),
    "truths": (torch.tensor([[True, False]]), {}, "bool"),
    "no chunk": (torch.zeros(1, 3, dtype=torch.int64), {"chunk": 0}, "chunk=0 must be at least 1"),
    "whole numbers kept": (
        torch.zeros(1, 3, dtype=torch.int64),
        {"dtype": torch.int8},
        "dtype=torch.int8 must be a floating-point type",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_prompts_that_cannot_be_read_are_refused(case):
    ids, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        prefill(drawn("long context"), ids, **options)


def test_an_id_outside_the_vocabulary_is_refused_before_anything_is_read():
    ids, told = torch.zeros(1, 50, dtype=torch.int64), []
    ids[0, 49] = 23
    with pytest.raises(ValueError, match="id 23 is outside the vocabulary"):
        prefill(drawn("long context"), ids, chunk=5, progress=lambda *facts: told.append(facts))
    assert not told
