"""Likelihoods and text of a decoder: against its logits, one text at a time, and in every batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from train_helpers import tiny_run

from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.probes.likelihood import rolling_windows, windows_of
from moe.probes.prober import Prober, before, find_tokenizer, open_prober
from moe.train.loop import train
from moe.train.tokenizer import BPETokenizer, ByteTokenizer

TEXT = b"the router sends tokens to experts; every expert answers, and the answers are summed up"
PAIRS = [(5, 3), (1, 1), (12, 7), (3, 9), (20, 1), (2, 2)]  # lengths of context and continuation
GREEDY = {"max_new_tokens": 6, "temperature": 0.0}


def small_decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.4,
    }
    return Decoder(DecoderConfig(**(sizes | changes))).eval()


@pytest.fixture(scope="module")
def prober() -> Prober:
    return Prober(model=small_decoder(), tokenizer=ByteTokenizer(), length=32, batch=4)


def pairs_of(lengths) -> list[tuple[list[int], list[int]]]:
    return [(list(TEXT[i : i + c]), list(TEXT[i + c : i + c + n])) for i, (c, n) in enumerate(lengths)]


def by_hand(model: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Sum of log-softmax of the decoder's own logits at each token of the continuation."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logits: Tensor = model(ids).logits[0].double()
    total, greedy = 0.0, True
    for place, token in enumerate(continuation, start=len(context)):
        total += (logits[place - 1][token] - logits[place - 1].logsumexp(-1)).item()
        greedy &= logits[place - 1].argmax().item() == token
    return total, greedy


def test_a_score_is_the_sum_of_log_probabilities_of_the_decoder(prober):
    for score, pair in zip(prober.score(pairs_of(PAIRS)), pairs_of(PAIRS), strict=True):
        total, greedy = by_hand(prober.model, *pair)
        assert score.log_probability == pytest.approx(total, abs=1e-4)
        assert score.is_greedy == greedy


def test_a_batch_of_different_lengths_gives_what_each_gives_alone(prober):
    together = prober.score(pairs_of(PAIRS))
    alone = [prober.score([pair])[0] for pair in pairs_of(PAIRS)]
    for one, other in zip(together, alone, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5)
        assert one.is_greedy == other.is_greedy
    assert prober.score([]) == []


def test_what_the_decoder_writes_greedily_is_greedy_and_nothing_else(prober):
    context = list(TEXT[:9])
    written = prober.model.generate(torch.tensor([context]), max_new_tokens=5, temperature=0)[0, 9:].tolist()
    changed = [*written[:2], (written[2] + 1) % 255, *written[3:]]
    assert [s.is_greedy for s in prober.score([(context, written), (context, changed)])] == [True, False]


def test_an_empty_continuation_is_certain_and_an_empty_context_refused(prober):
    (score,) = prober.score([([1], [])])
    assert score.log_probability == 0 and score.is_greedy
    with pytest.raises(ValueError, match="context is empty"):
        prober.score([([], [1])])


def test_a_context_that_is_too_long_loses_its_beginning(prober):
    context, continuation = list(TEXT[:60]), list(TEXT[60:70])
    (score,) = prober.score([(context, continuation)])
    kept = context[-(32 + 1 - 10) :]
    assert score.log_probability == pytest.approx(by_hand(prober.model, kept, continuation)[0], abs=1e-4)


def test_a_long_continuation_is_scored_in_windows_each_token_once(prober):
    ids = list(TEXT[:80])
    (score,) = prober.score([([7], ids)])
    total = by_hand(prober.model, [7], ids[:32])[0]
    total += by_hand(prober.model, ids[31:32], ids[32:64])[0]
    total += by_hand(prober.model, ids[47:64], ids[64:80])[0]
    assert score.log_probability == pytest.approx(total, abs=1e-3)


@given(st.integers(0, 40), st.integers(1, 12))
def test_rolling_windows_count_every_token_once(tokens, length):
    text = list(range(1, tokens + 1))
    windows = list(rolling_windows(0, text, length))
    assert [token for window in windows for token in window.ids[-window.count :]] == text
    for window in windows:
        assert 1 <= window.count <= len(window.ids) - 1 <= length
        assert window.ids == list(range(window.ids[0], window.ids[-1] + 1))
    assert all(len(window.ids) - 1 == min(length, tokens) for window in windows)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 12))
def test_every_token_of_a_continuation_counts_once(context, continuation, length):
    before_it, counted = list(range(context)), list(range(100, 100 + continuation))
    windows = list(windows_of(before_it, counted, length))
    assert [token for window in windows for token in window.ids[-window.count :]] == counted
    assert all(len(window.ids) - 1 <= length for window in windows)


# Writing


def test_a_text_is_what_the_decoder_generates(prober):
    contexts = [list(TEXT[i : i + n]) for i, n in ((0, 9), (3, 4), (30, 15))]
    for text, context in zip(prober.write(contexts, options=GREEDY), contexts, strict=True):
        ids = prober.model.generate(torch.tensor([context]), **GREEDY)[0, len(context) :]
        assert text == prober.text(ids.tolist())


def test_a_text_ends_before_the_first_stop(prober):
    (whole,) = prober.write([list(TEXT[:9])], options=GREEDY)
    assert len(whole) > 3
    stop = whole[2:4]
    (text,) = prober.write([list(TEXT[:9])], stops=["never there", stop], options=GREEDY)
    assert text == whole[: whole.index(stop)]


def test_the_first_of_several_stops_wins():
    assert before("one two three", ["three", " two"]) == "one"
    assert before("one", ["four"]) == "one"


def test_a_text_ends_where_the_model_ends_it(prober):
    context = list(TEXT[:9])
    ids = prober.model.generate(torch.tensor([context]), **GREEDY)[0, len(context) :].tolist()
    last = next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])
    tokenizer = ByteTokenizer()
    tokenizer.end_of_text = ids[last]
    ends = Prober(model=prober.model, tokenizer=tokenizer, length=32)
    assert ends.write([context], options=GREEDY) == [prober.text(ids[:last])]


def test_a_long_context_leaves_room_for_the_answer(prober):
    options = {"max_new_tokens": 100, "temperature": 0.0}
    (text,) = prober.write([list(TEXT)], options=options)
    kept = list(TEXT[-16:])
    ids = prober.model.generate(torch.tensor([kept]), max_new_tokens=16, temperature=0)[0, 16:]
    assert text == prober.text(ids.tolist())


# Folders


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_run_folder_is_opened_with_its_tokens_and_its_length(tmp_path, tokenizer):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    settings = [f'data.tokenizer="{tokenizer}"', "data.sequence_length=24"]
    more = ["model.vocab_size=300"] if tokenizer == "bpe" else []
    train(tiny_run(tmp_path, *settings, *more), tmp_path / "run")
    prober = open_prober(tmp_path / "run", batch=3)
    assert prober.length == 24 and prober.batch == 3
    assert prober.text(prober.ids("the expert é")) == "the expert é"
    (score,) = prober.score([(prober.ids("the expert"), prober.ids(" router"))])
    expected, _ = by_hand(prober.model, prober.ids("the expert"), prober.ids(" router"))
    assert score.log_probability == pytest.approx(expected, abs=1e-4)
    assert open_prober(tmp_path / "run", checkpoint="step_00000010").length == 24
    with pytest.raises(FileNotFoundError, match="step_00000011"):
        open_prober(tmp_path / "run", checkpoint="step_00000011")


def test_a_model_folder_is_opened_with_bytes_or_its_tokenizer(tmp_path):
    small_decoder(max_position_embeddings=77).save_pretrained(tmp_path / "bytes")
    prober = open_prober(tmp_path / "bytes")
    assert prober.length == 77 and prober.tokenizer.identity == "bytes"
    assert open_prober(tmp_path / "bytes", length=5).length == 5
    with pytest.raises(ValueError, match="holds no run"):
        open_prober(tmp_path / "bytes", checkpoint="step_1")
    small_decoder(vocab_size=300).save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="vocab_size=300 is not 256"):
        open_prober(tmp_path / "words")
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train([TEXT.decode()], 280)
    (tmp_path / "words" / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    assert open_prober(tmp_path / "words").tokenizer.identity == tokenizer.identity
    (tmp_path / "words" / "tokenizer.json").write_text(
        tokenizer.json.replace("<|endoftext|>", "<s>"), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="no token"):
        find_tokenizer(tmp_path / "words")


@pytest.mark.parametrize("change", [{"length": 0}, {"batch": 0}])
def test_a_size_below_one_is_refused(prober, change):
    with pytest.raises(ValueError, match="must be at least 1"):
        Prober(model=prober.model, tokenizer=prober.tokenizer, **({"length": 4, "batch": 2} | change))
