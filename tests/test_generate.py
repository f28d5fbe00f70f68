"""Sampling: filters against naive definitions, seeds, stops, streaming, and what is left untouched."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.generate import STOPPED, Sampling, keep_min_p, keep_top_k, keep_top_p, stream

PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig(
            vocab_size=13,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            moe_intermediate_size=8,
            num_experts=4,
            num_experts_per_tok=2,
            initializer_range=0.4,
            router_jitter_noise=0.3,  # so that training mode would show
        )
    )


def greedy(decoder: Decoder, ids: Tensor, new: int) -> Tensor:
    """One token at a time, everything computed again."""
    decoder.eval()
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, decoder(ids).logits[:, -1:].argmax(-1)], dim=1)
    decoder.train()
    return ids


def test_temperature_zero_takes_the_likeliest_token(decoder):
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=9, temperature=0), greedy(decoder, PROMPT, 9))


def test_a_left_padded_prompt_continues_as_if_it_were_alone(decoder):
    mask = torch.ones_like(PROMPT, dtype=torch.bool)
    mask[0, :2] = False
    batch = decoder.generate(PROMPT, max_new_tokens=9, temperature=0, mask=mask)
    assert torch.equal(batch[:1, 2:], greedy(decoder, PROMPT[:1, 2:], 9))
    assert torch.equal(batch[1:], greedy(decoder, PROMPT[1:], 9))


def test_a_seed_fixes_the_draw_and_leaves_the_global_random_state(decoder):
    state = torch.get_rng_state()
    first = decoder.generate(PROMPT, max_new_tokens=20, seed=7)
    torch.rand(5)
    torch.set_rng_state(state)
    assert torch.equal(first, decoder.generate(PROMPT, max_new_tokens=20, seed=7))
    draws = {tuple(decoder.generate(PROMPT, max_new_tokens=20).flatten().tolist()) for _ in range(3)}
    assert len(draws) == 3
    assert not torch.equal(first, decoder.generate(PROMPT, max_new_tokens=20, seed=8))
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_drawn_with_the_models_probabilities(decoder):
    decoder.eval()
    with torch.no_grad():
        expected = (decoder(PROMPT[:1]).logits[0, -1] / 1.5).softmax(-1)
    many = decoder.generate(PROMPT[:1].expand(4000, -1), max_new_tokens=1, temperature=1.5, seed=0)
    found = torch.bincount(many[:, -1], minlength=13) / 4000
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all()
    decoder.train()


def test_a_tiny_temperature_is_greedy_and_not_nan(decoder):
    tiny = decoder.generate(PROMPT, max_new_tokens=5, temperature=1e-42, seed=0)
    assert torch.equal(tiny, greedy(decoder, PROMPT, 5))


rows = st.lists(st.integers(-20, 20), min_size=1, max_size=12).map(lambda row: torch.tensor([row]) / 4.0)


def kept(logits: Tensor) -> list[int]:
    return (logits[0] > -math.inf).nonzero().flatten().tolist()


@settings(deadline=None)
@given(rows, st.integers(1, 14))
def test_top_k_keeps_the_tokens_that_fewer_than_k_others_beat(logits, k):
    row = logits[0].tolist()
    assert kept(keep_top_k(logits, k)) == [i for i, x in enumerate(row) if sum(y > x for y in row) < k]


@settings(deadline=None)
@given(rows, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_p(logits, p):
    probabilities = logits.double().softmax(-1)[0].tolist()
    chosen, reached = [], 0.0
    for i in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if reached >= p:
            break
        chosen.append(i)
        reached += probabilities[i]
    assert kept(keep_top_p(logits.double(), p)) == sorted(chosen)


@settings(deadline=None)
@given(rows, st.floats(0.0, 1.0))
def test_min_p_keeps_tokens_within_a_factor_of_the_likeliest(logits, p):
    probabilities = logits.double().softmax(-1)[0]
    ratio = probabilities / probabilities.max()
    sure = (ratio - p).abs() > 1e-9
    expected = set((sure & (ratio > p)).nonzero().flatten().tolist())
    doubtful = set((~sure).nonzero().flatten().tolist())
    found = set(kept(keep_min_p(logits.double(), p)))
    assert expected <= found <= expected | doubtful
    assert int(logits.argmax()) in found


def test_filters_never_empty_a_row_and_reach_the_draw(decoder):
    for option in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        drawn = decoder.generate(PROMPT, max_new_tokens=6, seed=0, **option)
        assert torch.equal(drawn, greedy(decoder, PROMPT, 6))


def test_streaming_yields_what_generate_returns(decoder):
    seen: list[Tensor] = []
    whole = decoder.generate(PROMPT, max_new_tokens=12, seed=3, on_token=seen.append)
    streamed = list(stream(decoder, PROMPT, max_new_tokens=12, seed=3))
    assert torch.equal(torch.stack(streamed, dim=1), whole[:, 5:])
    assert all(map(torch.equal, seen, streamed)) and len(seen) == 12


def test_rows_end_with_their_stop_and_are_padded_after_it(decoder):
    free = greedy(decoder, PROMPT, 12)
    new = free[:, 5:].tolist()
    stop = [new[0][3:5], new[1][6]]
    ended = decoder.generate(PROMPT, max_new_tokens=12, temperature=0, stop=stop, pad=0)
    lengths = [first_end(row, [tuple(stop[0]), (stop[1],)]) for row in new]
    assert ended.shape[1] == 5 + max(lengths)
    for row, length in enumerate(lengths):
        assert torch.equal(ended[row, : 5 + length], free[row, : 5 + length])
        assert (ended[row, 5 + length :] == 0).all()
    steps = torch.stack(list(stream(decoder, PROMPT, max_new_tokens=12, temperature=0, stop=stop)), dim=1)
    assert [int((row != STOPPED).sum()) for row in steps] == lengths


def first_end(row: list[int], stops: list[tuple[int, ...]]) -> int:
    ends = [n for n in range(1, len(row) + 1) for stop in stops if tuple(row[:n][-len(stop) :]) == stop]
    return min(ends, default=len(row))


def test_a_sequence_of_ids_stops_a_row_where_it_is_complete(decoder):
    new = greedy(decoder, PROMPT[:1], 12)[0, 5:].tolist()
    stop = new[3:6]
    length = first_end(new, [tuple(stop)])
    assert decoder.generate(PROMPT[:1], max_new_tokens=12, temperature=0, stop=[stop]).shape == (
        1,
        5 + length,
    )
    assert 3 <= length <= 6


def test_one_stop_id_needs_no_list(decoder):
    token = int(greedy(decoder, PROMPT[:1], 1)[0, -1])
    assert decoder.generate(PROMPT[:1], max_new_tokens=9, temperature=0, stop=token).shape == (1, 6)


def test_a_stop_in_the_prompt_does_not_count(decoder):
    new = greedy(decoder, PROMPT[:1], 4)[0, 5:].tolist()
    across = [5, new[0]]
    assert decoder.generate(PROMPT[:1], max_new_tokens=4, temperature=0, stop=[across]).shape == (1, 9)


def test_training_and_gradient_mode_are_the_callers_between_and_after_steps(decoder):
    decoder.train()
    decoder.model.norm.eval()
    modes = [module.training for module in decoder.modules()]
    for _ in stream(decoder, PROMPT, max_new_tokens=3, seed=0):
        assert torch.is_grad_enabled()
        assert [module.training for module in decoder.modules()] == modes
    with pytest.raises(ValueError, match="id 99"):
        decoder.generate(torch.tensor([[99]]), max_new_tokens=3)
    assert [module.training for module in decoder.modules()] == modes and torch.is_grad_enabled()
    decoder.train()


@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"stop": [[]]},
        {"stop": "\n"},
    ],
    ids=str,
)
def test_a_nonsense_option_is_named(decoder, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}="):
        stream(decoder, PROMPT, **({"max_new_tokens": 2} | option))


@pytest.mark.parametrize(
    "ids", [torch.zeros(1, 0), torch.zeros(0, 3), torch.zeros(3)], ids=["no token", "no row", "one axis"]
)
def test_an_empty_prompt_is_refused(decoder, ids):
    with pytest.raises(ValueError, match="at least one token"):
        stream(decoder, ids.long(), max_new_tokens=2)


def test_right_padding_is_refused(decoder):
    mask = torch.ones_like(PROMPT, dtype=torch.bool)
    mask[0, -1] = False
    with pytest.raises(ValueError, match="pad on the left"):
        decoder.generate(PROMPT, max_new_tokens=2, mask=mask)


def test_nan_logits_are_an_error(decoder):
    weight = decoder.model.norm.weight.detach().clone()
    with torch.no_grad():
        decoder.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        decoder.generate(PROMPT, max_new_tokens=2)
    with torch.no_grad():
        decoder.model.norm.weight.copy_(weight)


class _Reads(TorchDispatchMode):
    """Counts what makes a GPU be waited for: numbers that are read off the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dense(monkeypatch) -> Decoder:
    """Generates as on a GPU; without experts, which on a CPU look at how many pairs they have."""
    monkeypatch.setattr(Sampling, "must_look", lambda self, device: False)
    return Decoder(
        DecoderConfig(
            vocab_size=13,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=0,
            intermediate_size=16,
        )
    )


def test_a_greedy_continuation_on_a_gpu_is_waited_for_as_often_however_long_it_is(dense, monkeypatch):
    def reads(tokens: int) -> int:
        lists = []
        with _Reads() as mode, monkeypatch.context() as patch:
            tolist = Tensor.tolist
            patch.setattr(Tensor, "tolist", lambda self: (lists.append(self), tolist(self))[1])
            dense.generate(PROMPT, max_new_tokens=tokens, temperature=0.0)
        return mode.count + len(lists)

    assert reads(12) == reads(2) > 0


def test_nan_in_any_step_is_found_with_the_last_token(dense, monkeypatch):
    logits = [torch.zeros(2, 13), torch.full((2, 13), math.nan), torch.zeros(2, 13)]
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: logits.pop(0))
    with pytest.raises(FloatingPointError, match="NaN"):
        dense.generate(PROMPT, max_new_tokens=3, temperature=0.0)
    assert not logits


def test_steps_that_need_the_one_before_are_looked_at():
    greedy, cuda = Sampling(max_new_tokens=2, temperature=0.0), torch.device("cuda")
    assert not greedy.must_look(cuda) and greedy.must_look(torch.device("cpu"))
    assert Sampling(max_new_tokens=2, temperature=1.0).must_look(cuda)
    assert Sampling(max_new_tokens=2, temperature=0.0, stop=3).must_look(cuda)
