"""What a run is asked, how answers are counted, and what is refused before anything is read."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from needle_helpers import Oracle, oracle_run, write_text

from moe.decoder import Decoder
from moe.probes.needle import evaluate, measured
from moe.probes.needle.ask import answer, ask
from moe.probes.needle.evaluate import check_dtype, check_memory, check_run, evaluate_needles
from moe.probes.needle.haystack import build_haystack
from moe.probes.needle.measured import check_target, measured_on, save_results
from moe.probes.needle.questions import Questions, make_haystacks
from moe.probes.needle.record import NeedleRecord
from moe.train.corpus import digest_file, find_corpus
from moe.train.files import write_json
from moe.train.presets import needle

LENGTH = 16_384
BOTH = ("key_value", "sentence")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("needle")
    write_text(root / "text")
    return root


@pytest.fixture
def run(root):
    return oracle_run(root)


@pytest.fixture
def questions(root) -> Questions:
    return Questions(queries=20, haystacks=2, folder=root / "text")


# Answers


def test_a_model_that_knows_has_full_recall_at_every_depth(run, questions):
    rows = evaluate_needles(run, questions, LENGTH)
    assert [(row.template, row.right, row.asked) for row in rows] == [(name, 20, 20) for name in BOTH]
    for row in rows:
        assert [part.asked for part in row.quintiles] == [4] * 5
        assert (row.run, row.step, row.length, row.haystacks, row.needles) == ("oracle", 7, LENGTH, 2, 64)
        assert (row.variant, row.dtype, row.text["repeated"]) == ("", "float32", False)
        assert row.trained_length == 3072 and row.cache_bytes >= 4 * LENGTH


def test_with_shuffled_values_even_a_model_that_knows_is_at_chance(run, questions):
    rows = evaluate_needles(run, replace(questions, shuffled=True), LENGTH)
    assert [(row.variant, row.right, row.asked) for row in rows] == [("shuffled values", 0, 20)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cache_may_be_kept_in_16_bits(run, questions, dtype):
    whole, *_ = evaluate_needles(run, questions, LENGTH)
    row, *_ = evaluate_needles(run, replace(questions, dtype=dtype), LENGTH)
    assert (row.right, row.dtype) == (20, str(dtype).removeprefix("torch."))
    assert row.cache_bytes < 0.6 * whole.cache_bytes


def test_only_the_whole_answer_counts(root, questions):
    class Careless(Oracle):
        def next(self, text, suffix):
            last_digit = re.search(rb"[=:? ](\d{5})$", suffix)
            return super().next(text, suffix) ^ bool(last_digit)

    rows = evaluate_needles(oracle_run(root, model=Careless), questions, LENGTH)
    assert [row.right for row in rows] == [0, 0]


def tiny_decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(replace(needle().model, hidden_size=16, num_experts=4)).eval()
    with torch.no_grad():
        decoder.head_weight.mul_(20)  # answers that do not hang on the last bit
    return decoder


def test_questions_asked_together_are_answered_as_alone(root):
    text = np.frombuffer((root / "text" / "text0.txt").read_bytes(), np.uint8)
    haystack = build_haystack(text, length=4096, queries=8, seed=0)
    decoder = tiny_decoder()
    asked = ask(decoder, haystack, batch=1)
    together = answer(decoder, asked.prefill.cache, haystack.questions, batch=64)
    assert together == asked.answers and len(set(together)) > 3


def test_progress_follows_the_reading_and_the_questions(run, questions):
    read, answered, lines = [], [], []
    evaluate_needles(
        run,
        replace(questions, haystacks=1, batch=8),
        LENGTH,
        progress=lambda done, total, seconds: read.append((done, total)),
        answered=lambda done, total, seconds: answered.append((done, total)),
        log=lines.append,
    )
    assert read == [(8192, LENGTH), (LENGTH, LENGTH)]
    assert [done for done, _ in answered] == sorted({done for done, _ in answered})
    assert {total for _, total in answered} == {40} and answered[-1] == (40, 40) and len(answered) >= 5
    assert len(lines) == 1 and lines[0].startswith("haystack 1: 40/40 right, read in")


def test_products_in_16_bits_are_named(root, questions):
    plain, *_ = evaluate_needles(oracle_run(root), questions, LENGTH)
    narrow = oracle_run(root, "train.precision=bfloat16")
    row, *_ = evaluate_needles(narrow, questions, LENGTH)
    assert narrow.precision == torch.bfloat16
    assert row.path == f"{plain.path}; products in bfloat16" and row.right == 20


# Haystacks


@given(st.integers(1, 2000), st.integers(1, 9), st.integers(1024, 2**22), st.integers(1, 2))
def test_questions_are_spread_evenly_over_as_many_haystacks_as_they_need(
    queries, haystacks, length, templates
):
    queries = max(queries, haystacks)
    questions = Questions(queries=queries, haystacks=haystacks, templates=BOTH[:templates])
    shares = questions.shares(length)
    most = min(length // 256, 2000 if length <= 2**20 else 5000) // templates
    assert sum(shares) == queries and 1 <= max(shares) <= most and max(shares) - min(shares) <= 1
    assert len(shares) == haystacks or (len(shares) - 1) * most < queries


def test_a_haystack_with_few_needles_is_followed_by_more(run, questions):
    rows = evaluate_needles(run, replace(questions, needles=8), LENGTH)
    assert [(row.haystacks, row.needles, row.asked, row.right) for row in rows] == [(5, 8, 20, 20)] * 2


def test_the_seed_chooses_text_needles_and_questions(run, questions):
    def made(seed):
        haystacks = make_haystacks(run, replace(questions, seed=seed), LENGTH)
        return [(haystack.questions, haystack.ids.tobytes(), text.digest) for haystack, text in haystacks]

    first, again, other = made(0), made(0), made(1)
    assert first == again
    assert not set(first) & set(other) and len({digest for *_, digest in first}) == 2


def test_no_file_that_was_trained_on_is_in_a_haystack(root, tmp_path):
    run = oracle_run(root)
    corpus = find_corpus(run.config.data)
    assert corpus.train and corpus.validation
    folder = tmp_path / "mixed"
    write_text(folder, files=3)
    for number, document in enumerate((*corpus.train, *corpus.validation)):
        (folder / f"copy{number}.txt").write_bytes(document.path.read_bytes())
    for seed in range(4):
        for haystack, text in make_haystacks(run, Questions(queries=4, folder=folder, seed=seed), 65_536):
            assert b"trained" not in haystack.ids.tobytes() and text.digest
    copy = folder / "copy0.txt"
    copy.write_bytes(copy.read_bytes() + b"one line more\n")  # another file now
    assert digest_file(copy)[0] not in {document.digest for document in (*corpus.train, *corpus.validation)}


def test_a_text_that_is_too_short_is_repeated_only_when_asked_and_then_labelled(run, tmp_path):
    folder = write_text(tmp_path / "short", files=1, lines=100)
    questions = Questions(queries=4, haystacks=2, folder=folder)
    with pytest.raises(ValueError, match="repeat the text"):
        check_run(run, questions, [2048, LENGTH])
    assert run.model.read == 0
    rows = evaluate_needles(run, replace(questions, repeat=True), LENGTH)
    assert all(row.text["repeated"] and row.right == 4 for row in rows)
    rows = evaluate_needles(run, replace(questions, repeat=True), 2048)
    assert not any(row.text["repeated"] for row in rows)


def test_a_run_whose_text_changed_is_not_asked(root, tmp_path, questions):
    run = oracle_run(tmp_path)
    write_json(run.folder / "corpus.json", {"digest": find_corpus(run.config.data).digest})
    check_run(run, questions, [LENGTH])
    changed = oracle_run(tmp_path, 'data.suffixes=["0.txt"]')
    with pytest.raises(ValueError, match="was trained on changed since"):
        check_run(changed, questions, [LENGTH])


# Refusals


@pytest.mark.parametrize("changes", [{"queries": 0}, {"haystacks": -1}, {"batch": 0}, {"needles": 0}])
def test_nothing_to_ask_is_refused(questions, changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"{name}={value} must be at least 1"):
        replace(questions, **changes)


def test_every_haystack_is_asked_about(questions):
    with pytest.raises(ValueError, match="queries=2 must be at least haystacks=3"):
        replace(questions, queries=2, haystacks=3)
    with pytest.raises(ValueError, match="seed=-1"):
        replace(questions, seed=-1)


def test_a_length_beyond_memory_is_refused_with_one_that_fits(run, questions, monkeypatch):
    monkeypatch.setattr(evaluate, "memory_available", lambda device: evaluate.BESIDE_CACHE + 10**7)
    with pytest.raises(ValueError, match=r"length=10000000 needs .* are free: \d+ would fit") as caught:
        check_run(run, questions, [LENGTH, 10**7])
    assert "bfloat16" in str(caught.value) and run.model.read == 0
    fits = int(re.findall(r"(\d+) would fit", str(caught.value))[0])
    check_memory(run, questions.dtype, [fits])
    with pytest.raises(ValueError, match="would fit"):
        check_memory(run, questions.dtype, [fits + 1])
    check_memory(run, torch.bfloat16, [fits + fits // 2])
    with pytest.raises(ValueError) as caught:
        check_memory(run, torch.bfloat16, [10**7])
    assert "bfloat16" not in str(caught.value)


def test_memory_that_is_unknown_or_used_up_is_no_reason_to_fail_oddly(run, questions, monkeypatch):
    monkeypatch.setattr(evaluate, "memory_available", lambda device: None)
    check_memory(run, questions.dtype, [10**12])
    monkeypatch.setattr(evaluate, "memory_available", lambda device: 0)
    with pytest.raises(ValueError, match=r": 0 would fit"):
        check_memory(run, questions.dtype, [LENGTH])


def test_a_gpu_holds_the_cache_and_the_host_the_text(questions):
    config = needle().model
    places = evaluate._places(config, torch.float32, torch.device("cuda", 0))
    assert {what: per_token for what, (per_token, _) in places.items()} == {
        "memory": 3,
        "memory of cuda:0": 512,
    }


def test_other_tokens_than_bytes_are_refused(root, questions):
    run = oracle_run(root)
    data, model = replace(run.config.data, tokenizer="bpe"), replace(run.config.model, vocab_size=300)
    run = replace(run, config=replace(run.config, data=data, model=model, needle=None))
    with pytest.raises(ValueError, match=r"tokenizer='bpe'; needles are bytes"):
        check_run(run, questions, [LENGTH])


def test_a_dtype_that_the_device_lacks_is_refused(monkeypatch):
    def refuse(*_, **__):
        raise TypeError("the framework has no such dtype")

    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(ValueError, match=r"cpu has no torch.bfloat16 .*Keep the cache in float32"):
        check_dtype(torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "lengths", "message"),
    [
        ({}, [], "no length"),
        ({}, [400], "1 needles for 2 templates"),
        ({"needles": 400}, [4096], "400 needles have"),
        ({"templates": ("definition",)}, [4096], "must be different ones of"),
    ],
)
def test_haystacks_that_cannot_be_built_are_refused_before_anything_is_read(
    run, questions, changes, lengths, message
):
    with pytest.raises(ValueError, match=message):
        check_run(run, replace(questions, **changes), lengths)
    assert run.model.read == 0


# Files


def test_a_record_says_where_it_was_measured(run, questions, tmp_path):
    facts = measured_on(torch.device("cpu"))
    assert facts["versions"]["torch"] == torch.__version__ and re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])
    record = NeedleRecord(tuple(evaluate_needles(run, questions, LENGTH)), facts)
    record.save(tmp_path / "needle.json")
    assert NeedleRecord.load(tmp_path / "needle.json") == record


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "_ROOT", tmp_path)
    assert measured_on(torch.device("cpu"))["commit"] is None


def test_results_are_kept_whole_or_not_at_all(run, questions, tmp_path):
    rows = evaluate_needles(run, questions, LENGTH)
    file = tmp_path / "rows.json"
    save_results(file, rows, {"device": "cpu"})
    before = file.read_text()
    assert json.loads(before)["results"][1]["template"] == "sentence"
    with pytest.raises(ValueError, match="Out of range"):
        save_results(file, rows, {"speed": float("nan")})
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


def test_files_that_cannot_be_written_are_refused_before(tmp_path):
    check_target(tmp_path / "a.json", ".json")
    with pytest.raises(ValueError, match=r"must end in \.json"):
        check_target(tmp_path / "a.png", ".json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_target(tmp_path / "nowhere" / "a.json", ".json")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_target(tmp_path / "b.json", ".json")
