"""Asking about languages: what is asked, what counts as right, what is refused, what is kept."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from language_helpers import ENTRY, GRAMMAR, Translator, code, translator_run
from needle_helpers import oracle_run, write_text

from moe.decoder import Decoder
from moe.prefill import prefill
from moe.probes.language.evaluate import check_run, evaluate_languages, mark
from moe.probes.language.exam import BOTH, CONDITIONS, DICTIONARY, NEITHER, Exam, write_paper
from moe.probes.language.record import LanguageRecord, merge
from moe.probes.language.table import format_tally, language_table
from moe.probes.needle.record import Tally
from moe.train.overrides import change, find_preset

HALF, GRAMMAR_ONLY = "grammar + half a dictionary", "grammar only"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("language")
    write_text(root / "text")
    return root


@pytest.fixture
def exam(root) -> Exam:
    return Exam(queries=24, languages=6, folder=root / "text")


def paper(exam: Exam, number: int = 0, *, condition: str = BOTH, examples: int = 0, filler: int = 0):
    return write_paper(
        exam, number, condition=condition, examples=examples, letters=(3, 3), filler=code(filler)
    )


# What is asked


def test_every_condition_asks_the_same_of_the_same_language(exam):
    papers = [
        paper(exam, condition=c, examples=k, filler=f) for c in CONDITIONS for k in (0, 8) for f in (0, 500)
    ]
    assert len({one.answers[0].query for one in papers}) == 1
    assert len({tuple(answer.answer for answer in one.answers) for one in papers}) == 1
    assert paper(exam, 1).answers[0].answer != papers[0].answers[0].answer
    assert paper(replace(exam, seed=1)).answers[0].answer != papers[0].answers[0].answer


def test_a_document_has_what_its_condition_says(exam):
    for condition, (lines, entries) in {
        BOTH: (1, 11),
        DICTIONARY: (0, 11),
        GRAMMAR_ONLY: (1, 0),
        HALF: (1, 6),
        NEITHER: (0, 0),
    }.items():
        text = paper(exam, condition=condition, examples=3, filler=400).ids.tobytes()
        assert (len(GRAMMAR.findall(text)), len(ENTRY.findall(text))) == (lines, entries), condition
        assert text.count(b"\n?") == 3 and len(text) > 400


def test_no_question_was_an_example_or_another_question(exam):
    asked = replace(exam, queries=600, languages=6)
    for number in range(6):
        one = paper(asked, number, examples=32)
        queries = [answer.query for answer in one.answers]
        assert len(set(queries)) == len(queries) == 100
        assert not any(query in one.ids.tobytes() for query in queries)


def test_more_examples_begin_with_the_same_ones(exam):
    few, many = (paper(exam, examples=k).ids.tobytes() for k in (4, 16))
    examples = [re.findall(rb"\n\?[^;]+;", text) for text in (few, many)]
    assert examples[0] == examples[1][:4] and len(examples[1]) == 16


def test_questions_are_shared_out_among_languages(exam):
    assert replace(exam, queries=20, languages=6).shares == [4, 4, 3, 3, 3, 3]


def test_without_examples_no_rule_is_shown(exam):
    assert not any(paper(exam).shown)
    assert all(paper(exam, examples=32).shown)


def test_a_word_is_given_by_the_book_or_by_an_example(exam):
    for condition, examples in ((BOTH, 0), (NEITHER, 0), (NEITHER, 8), (HALF, 2), (DICTIONARY, 0)):
        one = paper(replace(exam, queries=60), condition=condition, examples=examples)
        text = one.ids.tobytes()
        lines = re.findall(rb"\n\?([SVOa-z ]+)>", text)
        words = {a.decode() for a, _ in ENTRY.findall(text)} | {
            word[1:4].decode() for line in lines for word in line.split()
        }
        if GRAMMAR.search(text) or any(word[4:] for line in lines for word in line.split()):
            words.add("s")
        expected = tuple({part.english for part in answer.parts} <= words for answer in one.answers)
        assert one.given == expected, condition
    assert any(expected) and not all(expected)  # the dictionary has no plural word


# What counts as right


def test_a_model_that_reads_the_book_translates_everything(root, exam):
    run = translator_run(root)
    for filler in (0, 3000):
        row = evaluate_languages(run, exam, condition=BOTH, examples=2, filler=filler)
        assert row.tally == (24, 24) and row.words_right == row.words_asked > 72
        assert (row.run, row.step, row.languages, row.filler) == ("translator", 7, 6, filler)
        assert row.text["root"] == ("text" if filler else "")


def test_what_the_book_lacks_is_not_translated(root, exam):
    run = translator_run(root)
    rows = {c: evaluate_languages(run, exam, condition=c, examples=0) for c in CONDITIONS}
    assert rows[NEITHER].tally.right == rows[GRAMMAR_ONLY].tally.right == 0
    assert 0 < rows[DICTIONARY].tally.right < 12  # of sentences that need no rule but SVO
    assert rows[HALF].tally.right < 12 and 0.3 < rows[HALF].tally_words.recall < 0.9
    assert rows[GRAMMAR_ONLY].words_right > 0  # plural words


class Sloppy(Translator):
    """Gets the last letter of every sentence wrong, and nothing else."""

    def next(self, text: bytes, suffix: bytes) -> int:
        right = super().next(text, suffix)
        then = super().next(text, suffix + bytes([right]))
        return ord("?") if then and super().next(text, suffix + bytes([right, then])) == ord(";") else right


class Endless(Translator):
    """Never ends a sentence."""

    def next(self, text: bytes, suffix: bytes) -> int:
        right = super().next(text, suffix)
        return ord(" ") if right == ord(";") else right


@pytest.mark.parametrize("model", [Sloppy, Endless])
def test_one_wrong_byte_makes_a_sentence_wrong_and_at_most_one_word(root, exam, model):
    row = evaluate_languages(translator_run(root, model=model), exam, condition=BOTH, examples=0)
    assert row.tally.right == 0
    assert row.words_asked - row.words_right == (24 if model is Sloppy else 0)


def small_decoder(seed: int = 0) -> Decoder:
    config = change(find_preset("language"), None, ["model.hidden_size=16", "model.head_dim=16"])
    torch.manual_seed(seed)
    return Decoder(config.model).eval()


def test_marks_are_those_of_greedy_decoding(exam):
    """The answers are what the decoder writes itself, so all are right; with another last byte, none."""
    decoder, one = small_decoder(), paper(exam, examples=1)
    ids = torch.from_numpy(one.ids.copy()).long()[None]
    cache = prefill(decoder, ids).cache
    written = []
    for answer in one.answers:
        whole = torch.cat([ids, torch.tensor([list(answer.query)])], dim=1)
        out = decoder.generate(whole, max_new_tokens=len(answer.answer), temperature=0.0)
        written.append(answer._replace(answer=bytes(out[0, whole.shape[1] :].tolist())))
    assert [(m.is_exact, m.words_right) for m in mark(decoder, cache, written)] == [
        (True, len(one.parts)) for one in written
    ]
    other = [one._replace(answer=one.answer[:-1] + bytes([one.answer[-1] ^ 1])) for one in written]
    assert [(m.is_exact, m.words_right) for m in mark(decoder, cache, other)] == [
        (False, len(one.parts)) for one in written
    ]


def test_a_document_in_the_cache_is_the_document_before_the_question(exam):
    """Likeliest bytes after a fork of the cache, and in one pass over document and question."""
    decoder, one = small_decoder(1), paper(exam, examples=2, filler=300)
    ids = torch.from_numpy(one.ids.copy()).long()[None]
    cache = prefill(decoder, ids, chunk=100).cache
    answer = one.answers[0]
    suffix = torch.tensor([list(answer.query + answer.answer)])
    with torch.no_grad():
        forked = decoder.hidden(suffix, cache=cache.fork(1)).states
        whole = decoder.hidden(torch.cat([ids, suffix], dim=1)).states[:, ids.shape[1] :]
    assert torch.allclose(forked, whole, atol=1e-4)


# What is refused


def test_what_cannot_be_asked_is_refused_before(root, exam):
    run = translator_run(root)
    for conditions, examples, fillers, message in (
        (["dictionary"], [0], [0], "no condition 'dictionary'"),
        ([BOTH], [65], [0], "examples=65 must be from 0 to 64"),
        ([BOTH], [0], [-1], "filler=-1 must be at least 0"),
        ([BOTH], [0], [10**15], "GB are free"),
    ):
        with pytest.raises(ValueError, match=message):
            check_run(run, exam, conditions, examples, fillers)
    with pytest.raises(ValueError, match="have no part language"):
        check_run(oracle_run(root), exam, [BOTH], [0], [0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": 0}, "languages=0"),
        ({"languages": 25}, "languages=25 must be from 1 to queries=24"),
        ({"seed": -1}, "seed=-1"),
        ({"words": 99}, "words=99"),
    ],
)
def test_an_exam_that_cannot_be_is_refused(exam, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(exam, **changes)


def test_a_language_with_too_few_sentences_is_refused():
    with pytest.raises(ValueError, match="too few sentences"):
        paper(Exam(queries=900, languages=1, words=4))


def test_too_little_text_is_refused_or_repeated(root, exam):
    few = replace(exam, folder=write_text(root / "few", files=1, lines=10))
    with pytest.raises(ValueError, match="6000 are needed"):
        few.filler(translator_run(root), 1000)
    row = evaluate_languages(
        translator_run(root), replace(few, repeat=True), condition=BOTH, examples=0, filler=1000
    )
    assert row.text["repeated"] and row.tally.right == 24


# What is kept


@pytest.fixture(scope="module")
def record(root) -> LanguageRecord:
    run, exam = translator_run(root), Exam(queries=24, languages=6, folder=root / "text")
    rows = [evaluate_languages(run, exam, condition=c, examples=k) for c in CONDITIONS for k in (0, 4)]
    return LanguageRecord(tuple(rows), {"device": "cpu"})


def test_a_record_comes_back_equal_and_merged_records_count_once(record, tmp_path):
    record.save(tmp_path / "a.json")
    assert LanguageRecord.load(tmp_path / "a.json") == record
    assert merge([record, record]) == record
    other = LanguageRecord((replace(record.rows[0], run="other"),), {"device": "gpu"})
    both = merge([record, other])
    assert both.rows == (*record.rows, *other.rows) and both.environment == {"device": ["cpu", "gpu"]}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exact", [], "at least one"),
        ("exact", [1] * 24, "must be a list of true and false"),
        ("examples", -1, "examples=-1"),
        ("words", 0, "words=0 must be at least 1"),
        ("shown", [True], "must be one for every question"),
        ("given", [True], "must be one for every question"),
        ("run", None, "run=None must be a string"),
    ],
)
def test_a_record_that_is_none_is_refused_with_its_key(record, tmp_path, key, value, message):
    import json

    path = tmp_path / "a.json"
    record.save(path)
    data = json.loads(path.read_text())
    data["rows"][1][key] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"rows\[1\]: .*{re.escape(message)}"):
        LanguageRecord.load(path)


def test_the_table_has_a_line_for_each_condition_and_one_for_shown_rules(record):
    lines = [line for line in language_table(record) if line.startswith("|")]
    assert len(lines) == 2 + 9 + 2 + 5
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["11", "0", BOTH, "24/24 ≥ 88.2", "24/24 ≥ 88.2"]
    shown = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert shown[2] == "... whose rules the examples show" and shown[3] == "-" and shown[4] != "-"
    lacking = [cell.strip() for cell in lines[-7 - 1].split("|")[1:-1]]
    assert lacking[2].endswith("nowhere in the context") and lacking[3].startswith("0/24 ")


def test_a_bound_is_cut_off_and_one_from_above_rounded_up():
    assert format_tally(Tally(200, 200)) == "200/200 ≥ 98.5"
    assert format_tally(Tally(0, 200)) == "0/200 ≤ 1.5"
    assert format_tally(Tally(0, 0)) == "-"
    assert np.isclose(1 - Tally(200, 200).lower_bound, 0.01486, atol=1e-4)
