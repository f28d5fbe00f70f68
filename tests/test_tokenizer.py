"""Tokenizers lose nothing, and know how many bytes each token stands for."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_helpers import WORDS, tiny_run

from moe.train.corpus import find_corpus
from moe.train.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, load_tokenizer, save_tokenizer
from moe.train.tokens import load_tokens

TEXTS = [" ".join(WORDS), "def f(x):\n    return x\n" * 20, f"a text that spells {END_OF_TEXT} is text"]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(TEXTS * 5, 320)


@given(text=st.text())
def test_decoding_undoes_encoding(tokenizer, text):
    content = text.encode("utf-8", errors="ignore")
    assert tokenizer.decode(tokenizer.encode(content).tolist()) == content


@given(text=st.text())
def test_token_bytes_add_up_to_the_text(tokenizer, text):
    content = text.encode("utf-8", errors="ignore")
    assert tokenizer.token_bytes[tokenizer.encode(content).astype(np.int64)].sum() == len(content)


@given(text=st.text())
def test_no_text_encodes_to_the_end_of_text(tokenizer, text):
    spelled = f"{text}{END_OF_TEXT}".encode("utf-8", errors="ignore")
    assert tokenizer.end_of_text not in tokenizer.encode(spelled)


def test_the_end_of_text_is_no_text(tokenizer):
    assert (
        tokenizer.decode([tokenizer.end_of_text]) == b"" and tokenizer.token_bytes[tokenizer.end_of_text] == 0
    )


def test_ids_stay_below_the_vocabulary(tokenizer):
    ids = np.concatenate([tokenizer.encode(text.encode()) for text in TEXTS])
    assert ids.max() < tokenizer.vocab_size == len(tokenizer.token_bytes)


def test_bpe_is_shorter_than_bytes_on_text_like_its_own():
    pytest.importorskip("tokenizers")
    bpe = BPETokenizer.train(TEXTS * 5, 320)
    assert len(bpe.encode(TEXTS[1].encode())) < 0.6 * len(TEXTS[1])


def test_a_bpe_run_learns_from_its_training_files_and_keeps_its_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    config = tiny_run(tmp_path, "data.tokenizer=bpe", "model.vocab_size=300", "data.validation_fraction=0.3")
    tokens = load_tokens(config)
    assert tokens.train.dtype == np.uint16 and tokens.tokenizer.vocab_size <= 300
    texts = [document.path.read_bytes() for document in find_corpus(config.data).train]
    assert tokens.tokenizer.decode(tokens.train.tolist()) == b"".join(texts)
    assert tokens.tokenizer.token_bytes[tokens.train].sum() == sum(map(len, texts))
    save_tokenizer(tokens.tokenizer, tmp_path)
    assert load_tokenizer(config, tmp_path).identity == tokens.tokenizer.identity


def test_a_bpe_run_without_its_tokenizer_is_refused(tmp_path):
    config = tiny_run(tmp_path, "data.tokenizer=bpe", "model.vocab_size=300")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_tokenizer(config, tmp_path)


def test_bpe_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install"):
        load_tokens(tiny_run(tmp_path, "data.tokenizer=bpe", "model.vocab_size=300"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    large = BPETokenizer.train(TEXTS * 5, 320)
    config = tiny_run(tmp_path, "data.tokenizer=bpe", "model.vocab_size=300")
    with pytest.raises(ValueError, match=r"has 320 tokens, more than model\.vocab_size=300"):
        load_tokens(config, tokenizer=large)


def test_a_file_that_changes_before_a_tokenizer_is_learnt_from_it_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    config = tiny_run(tmp_path, "data.tokenizer=bpe", "model.vocab_size=300")
    found = find_corpus(config.data)
    path = found.train[0].path
    path.write_bytes(path.read_bytes().replace(b" ", b"_", 1))
    monkeypatch.setattr("moe.train.tokens.find_corpus", lambda config: found)
    with pytest.raises(ValueError, match="changed while it was read"):
        load_tokens(config)
    assert not list((tmp_path / "cache").iterdir())
