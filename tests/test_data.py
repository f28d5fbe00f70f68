"""The corpus is a pure function of the files' content, and a batch of (seed, step)."""

import os
import sysconfig
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_helpers import tiny_run, write_corpus

from moe.train import corpus as corpus_module
from moe.train.corpus import find_corpus, read_pieces
from moe.train.data import Windows, permute, train_batch
from moe.train.settings import DataConfig
from moe.train.tokenizer import ByteTokenizer
from moe.train.tokens import STALE_SECONDS, cache_folder, load_tokens, token_dtype, write_tokens


def data(folder: Path, **more) -> DataConfig:
    return DataConfig(folder=str(folder), **more)


def names(documents) -> set[str]:
    return {document.path.name for document in documents}


# Files


def test_every_file_is_in_exactly_one_split(tmp_path):
    found = find_corpus(data(write_corpus(tmp_path, files=40)))
    assert not names(found.train) & names(found.validation)
    assert len(found.train) + len(found.validation) == 40


def test_a_file_keeps_its_side_when_others_come_and_when_it_is_renamed(tmp_path):
    write_corpus(tmp_path, files=40)
    before = find_corpus(data(tmp_path))
    (tmp_path / "new.txt").write_text("something else")
    for path in sorted(tmp_path.glob("0*.txt")):
        path.rename(tmp_path / f"renamed-{path.name}")
    after = find_corpus(data(tmp_path))
    held_out = {document.digest for document in before.validation}
    assert held_out <= {document.digest for document in after.validation}
    assert {d.digest for d in before.train} <= {d.digest for d in after.train}


def test_the_digest_depends_on_content_and_not_on_names(tmp_path):
    first = find_corpus(data(write_corpus(tmp_path / "a"))).digest
    write_corpus(tmp_path / "b" / "deeper")
    assert find_corpus(data(tmp_path / "b")).digest == first
    (tmp_path / "b" / "deeper" / "00.txt").write_text("changed")
    assert find_corpus(data(tmp_path / "b")).digest != first


def test_identical_files_count_once(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "copy.txt").write_bytes((tmp_path / "00.txt").read_bytes())
    found = find_corpus(data(tmp_path))
    assert len(found.train) + len(found.validation) == 12 and found.duplicates == 1


def test_hidden_files_other_suffixes_and_empty_files_are_left_out(tmp_path):
    write_corpus(tmp_path, files=3)
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("x")
    (tmp_path / "page.html").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    found = find_corpus(data(tmp_path, suffixes=(".txt",)))
    assert names(found.train + found.validation) == {"00.txt", "01.txt", "02.txt"}


@pytest.mark.parametrize("files", [2, 3])
def test_both_splits_have_a_file_however_few_there_are(tmp_path, files):
    found = find_corpus(data(write_corpus(tmp_path, files=files), validation_fraction=0.01))
    assert found.train and found.validation


def test_a_single_file_is_cut_after_a_line(tmp_path):
    lines = [f"line {i}\n" for i in range(1000)]
    (tmp_path / "one.txt").write_text("".join(lines))
    found = find_corpus(data(tmp_path, validation_fraction=0.2))
    (train,), (validation,) = found.train, found.validation
    text = (tmp_path / "one.txt").read_bytes()
    assert (
        text[: train.stop].endswith(b"\n") and train.stop == validation.start and validation.stop == len(text)
    )
    assert 0.19 < validation.size / len(text) < 0.21


@given(st.text(min_size=1), st.integers(4, 64))
def test_pieces_join_to_the_file_and_cut_no_character(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("pieces") / "file.txt"
    content = text.encode("utf-8", errors="ignore")
    path.write_bytes(content)
    pieces = list(read_pieces(corpus_module.Document(path, "", 0, len(content), len(content)), size))
    assert b"".join(pieces) == content
    for piece in pieces:
        piece.decode("utf-8")


def test_the_default_corpus_is_the_standard_library():
    found = find_corpus(DataConfig(include_tests=False))
    assert found.root == Path(sysconfig.get_path("stdlib"))
    parts = [document.path.relative_to(found.root).parts for document in found.train + found.validation]
    assert not {"site-packages", "__pycache__", "test"} & {part for path in parts for part in path}
    assert sum(document.size for document in found.train) > 5e6


# Bad input


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_corpus(data(tmp_path / "nowhere"))


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="Give the folder"):
        find_corpus(data(tmp_path / "file"))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no text.*ends in \.txt"):
        find_corpus(data(tmp_path, suffixes=(".txt",)))


def test_an_unreadable_folder_is_refused(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    write_corpus(tmp_path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="cannot be read"):
        find_corpus(data(tmp_path))


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    write_corpus(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"00\.txt cannot be read"):
        find_corpus(data(tmp_path))


@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"good\xff", 4), (b"\xc3", 0), ("é".encode() * 50 + b"\x80", 100), (b"caf\xe9 au lait", 3)],
)
@pytest.mark.parametrize("block", [2, 1 << 20], ids=["split", "whole"])
def test_a_file_that_is_not_utf8_is_refused_with_file_and_offset(
    tmp_path, monkeypatch, content, offset, block
):
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", block)
    (tmp_path / "latin.txt").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf'latin\.txt is not UTF-8.* at offset {offset}\..*encoding="bytes"'
    ):
        find_corpus(data(tmp_path))


def test_bytes_mode_reads_anything(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
    assert "latin.txt" in names(
        sum(((f := find_corpus(data(tmp_path, encoding="bytes"))).train, f.validation), ())
    )


@pytest.mark.parametrize("length", [1_000, 100_000])
def test_a_corpus_shorter_than_one_sequence_is_refused(tmp_path, length):
    config = tiny_run(tmp_path, f"data.sequence_length={length}", "model.max_position_embeddings=100000")
    (tmp_path / "text" / "short.txt").write_text("x")
    for path in (tmp_path / "text").glob("*.txt"):
        path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=rf"shorter than one sequence: data.sequence_length={length}"):
        load_tokens(config)


# Tokens on disk


def test_tokens_are_memory_mapped_and_hold_every_byte_once(tmp_path):
    config = tiny_run(tmp_path)
    tokens = load_tokens(config)
    assert isinstance(tokens.train, np.memmap) and isinstance(tokens.validation, np.memmap)
    found = find_corpus(config.data)
    for split, documents in ((tokens.train, found.train), (tokens.validation, found.validation)):
        assert bytes(split) == b"".join(document.path.read_bytes() + b"\xff" for document in documents)
    assert tokens.manifest["train"]["bytes"] == sum(document.size for document in found.train)


def test_the_cache_is_used_and_a_damaged_one_is_made_again(tmp_path):
    config = tiny_run(tmp_path)
    lines: list[str] = []
    first = bytes(load_tokens(config, log=lines.append).train)
    load_tokens(config, log=lines.append)
    assert len(lines) == 1
    (file,) = (tmp_path / "cache").glob("tokens-*/train.bin")
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert bytes(load_tokens(config, log=lines.append).train) == first
    assert len(lines) == 2


def test_a_changed_file_is_another_corpus(tmp_path):
    config = tiny_run(tmp_path)
    before = load_tokens(config).manifest["digest"]
    (tmp_path / "text" / "00.txt").write_text("changed")
    assert load_tokens(config).manifest["digest"] != before


def test_a_cache_that_cannot_be_made_is_refused(tmp_path):
    config = tiny_run(tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"cannot be made.*data\.cache"):
        load_tokens(config)


def test_tokenising_holds_a_few_megabytes_of_a_file(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_bytes(f"{name} line of text\n".encode() * (20_000_000 // 15))
    found = find_corpus(data(folder))
    tracemalloc.start()
    try:
        write_tokens(found, ByteTokenizer(), tmp_path / "tokens")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6


@pytest.mark.parametrize("files", [1, 3], ids=["cut", "whole"])
@pytest.mark.parametrize("change", [lambda text: text + "more\n", lambda text: text[:-2] + "?\n"])
def test_a_file_that_changes_before_it_is_tokenised_is_refused(tmp_path, files, change):
    found = find_corpus(data(write_corpus(tmp_path / "text", files=files)))
    path = found.validation[0].path
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{path.name} changed while it was read"):
        write_tokens(found, ByteTokenizer(), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_what_killed_tokenisers_left_of_a_corpus_is_removed_and_what_live_ones_write_is_not(tmp_path):
    found = find_corpus(data(write_corpus(tmp_path / "text")))
    names = ("..tokens.123.tmp-0123abcd", ".tokens.123", ".tokens.124", ".other.123")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.bin").write_bytes(b"x")
        if name != ".tokens.124":
            for path in (tmp_path / name / "train.bin", tmp_path / name):
                os.utime(path, (0, time.time() - 2 * STALE_SECONDS))
    write_tokens(found, ByteTokenizer(), tmp_path / "tokens")
    assert [name for name in names if (tmp_path / name).exists()] == [".tokens.124", ".other.123"]


def test_the_second_of_two_processes_that_tokenise_keeps_the_folder_of_the_first(tmp_path):
    config = tiny_run(tmp_path)
    first = load_tokens(config)
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    inode = folder.stat().st_ino
    write_tokens(find_corpus(config.data), first.tokenizer, folder)
    assert folder.stat().st_ino == inode and list((tmp_path / "cache").iterdir()) == [folder]


@pytest.mark.parametrize(
    ("size", "name"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_smallest_integer_that_fits_is_stored(size, name):
    assert token_dtype(size).name == name


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if os.name != "nt":
        assert cache_folder(None) == tmp_path / "xdg" / "sparse-moe"
    monkeypatch.setenv("SPARSE_MOE_CACHE", str(tmp_path / "own"))
    assert cache_folder(None) == tmp_path / "own"
    assert cache_folder(str(tmp_path / "configured")) == tmp_path / "configured"


# Batches


@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 100))
def test_the_order_of_an_epoch_is_a_permutation(size, seed, epoch):
    order = permute(np.arange(size), size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_orders_differ_between_seeds_and_epochs_and_mix_well():
    def order(seed, epoch):
        return permute(np.arange(4096), 4096, seed=seed, epoch=epoch)

    assert not np.array_equal(order(0, 0), order(1, 0)) and not np.array_equal(order(0, 0), order(0, 1))
    places = order(0, 0)
    assert abs(np.corrcoef(places, np.arange(4096))[0, 1]) < 0.06
    assert np.abs(np.diff(places)).mean() == pytest.approx(4096 / 3, rel=0.1)  # as for independent places


@given(st.integers(2, 500), st.integers(1, 9), st.integers(1, 8), st.integers(0, 2**31))
def test_an_epoch_shows_every_target_once(length, sequence, batch, seed):
    if length <= sequence:
        return
    windows = Windows(np.arange(length), sequence)
    steps = -(-len(windows) // batch)
    seen = torch.cat([train_batch(windows, batch, seed=seed, step=step)[1] for step in range(steps)])
    first_epoch = seen[: len(windows)].flatten()
    assert torch.equal(first_epoch.sort().values, torch.arange(1, len(windows) * sequence + 1))


@given(st.integers(0, 2**31), st.integers(0, 10**6))
def test_a_batch_is_a_pure_function_of_seed_and_step(seed, step):
    windows = Windows(np.arange(1000), 7)
    once, again = (train_batch(windows, 4, seed=seed, step=step) for _ in range(2))
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])


def test_targets_are_the_next_tokens():
    ids, targets = train_batch(Windows(np.arange(1000, dtype=np.uint16), 9), 5, seed=1, step=3)
    assert torch.equal(ids + 1, targets) and ids.shape == (5, 9) and ids.dtype == torch.int64


def test_a_window_longer_than_the_tokens_is_refused():
    with pytest.raises(ValueError, match="shorter than one sequence"):
        Windows(np.arange(8), 8)


def test_validation_files_never_appear_in_train_batches(tmp_path):
    tokens = load_tokens(tiny_run(tmp_path))
    windows = Windows(tokens.train, 32)
    train_text = bytes(tokens.train)
    for step in range(5):
        for row in train_batch(windows, 8, seed=0, step=step)[0]:
            assert bytes(row.tolist()) in train_text
    validation = [text for text in bytes(tokens.validation).split(b"\xff") if text]
    assert validation and not any(text in train_text for text in validation)


def test_the_byte_tokenizer_is_the_default(tmp_path):
    assert isinstance(load_tokens(tiny_run(tmp_path)).tokenizer, ByteTokenizer)
