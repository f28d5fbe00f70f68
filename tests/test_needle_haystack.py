"""A haystack is real text that is never repeated, with needles anywhere and questions about some of them."""

import hashlib
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.probes.needle import haystack_text
from moe.probes.needle.haystack import Haystack, build_haystack, default_needles
from moe.probes.needle.haystack_text import find_text
from moe.probes.needle.needles import TEMPLATES
from moe.train.corpus import digest_file

LINES = [b"line %d: real text\n" % i for i in range(8000)]
TEXT = np.frombuffer(b"".join(LINES), np.uint8)


def build(length: int = 65_536, *, queries: int = 10, seed: int = 0, text=TEXT, **more) -> Haystack:
    return build_haystack(text, length=length, queries=queries, seed=seed, **more)


def written(haystack: Haystack) -> list[bytes]:
    """The bytes at the place of every needle, as long as it."""
    lines = [TEMPLATES[needle.template].write(needle.fact) for needle in haystack.needles]
    raw = haystack.ids.tobytes()
    return [raw[n.place : n.place + len(line)] for n, line in zip(haystack.needles, lines, strict=True)]


def without_needles(haystack: Haystack) -> bytes:
    raw, pieces, end = haystack.ids.tobytes(), [], 0
    for needle, line in zip(haystack.needles, written(haystack), strict=True):
        pieces.append(raw[end : needle.place])
        end = needle.place + len(line)
    return b"".join([*pieces, raw[end:]])


# Haystacks


@given(st.integers(2048, 20_000), st.integers(0, 3), st.sampled_from([1, 2]))
def test_a_haystack_is_consecutive_text_and_all_of_its_needles(length, seed, count):
    haystack = build(length, seed=seed, queries=1, templates=("key_value", "sentence")[:count])
    assert haystack.ids.dtype == np.uint8 and len(haystack.ids) == length
    assert len(haystack.needles) == default_needles(length)
    for needle, line in zip(haystack.needles, written(haystack), strict=True):
        assert line == TEMPLATES[needle.template].write(needle.fact)
    assert without_needles(haystack) in TEXT.tobytes()


def test_needles_stand_at_the_starts_of_lines():
    haystack = build()
    raw = haystack.ids.tobytes()
    at_line = sum(raw[needle.place - 1 : needle.place] in (b"\n", b"") for needle in haystack.needles)
    assert at_line >= len(haystack.needles) - 1  # the text may end in the middle of its last line


def test_text_without_lines_takes_needles_anywhere():
    text = np.frombuffer(b"abcdefgh" * 5000, np.uint8)
    haystack = build(16_384, text=text)
    assert len({needle.place for needle in haystack.needles}) == 64
    assert without_needles(haystack) in text.tobytes()


def test_needles_lie_at_all_depths():
    places = np.array([needle.place for needle in build(65_536).needles]) / 65_536
    assert (np.histogram(places, 4, (0, 1))[0] > 40).all()


def test_keys_differ_over_all_templates_and_every_template_has_its_share():
    needles = build(needles=301).needles
    assert len({needle.fact.key for needle in needles}) == 301
    assert sorted(Counter(needle.template for needle in needles).values()) == [150, 151]


def test_near_duplicates_are_not_neighbours():
    needles = build(needles=400, near_duplicate_values=1.0).needles

    def near(a: bytes, b: bytes) -> bool:
        return sum(x != y for x, y in zip(a, b, strict=True)) == 1

    values = [needle.fact.value for needle in needles]
    close = [
        any(near(value, other) for other in values[max(0, i - 20) : i]) for i, value in enumerate(values)
    ]
    assert np.mean(close) < 0.3  # all of them, if they lay in the order in which they are drawn


@pytest.mark.parametrize(
    ("length", "count"),
    [(16_384, 64), (262_144, 1024), (512_000, 2000), (2**20, 2000), (2**20 + 1, 4096), (10_000_000, 5000)],
)
def test_one_needle_per_256_bytes_up_to_a_cap(length, count):
    assert default_needles(length) == count


def test_a_question_asks_for_the_value_of_a_needle_at_its_depth():
    haystack = build(queries=20)
    by_place = {needle.place: needle for needle in haystack.needles}
    assert len(haystack.questions) == len({question.place for question in haystack.questions}) == 40
    for question in haystack.questions:
        needle = by_place[question.place]
        assert question.query == TEMPLATES[question.template].ask(needle.fact.key)
        assert (question.answer, question.template) == (needle.fact.value, needle.template)
        assert question.depth == question.place / 65_536 < 1
    assert Counter(question.template for question in haystack.questions) == {"key_value": 20, "sentence": 20}


def test_questions_are_balanced_over_the_depth():
    haystack = build(queries=15)
    counts = Counter((question.template, question.quintile) for question in haystack.questions)
    assert set(counts.values()) == {3} and len(counts) == 10


def test_every_needle_can_be_asked_for():
    haystack = build(16_384, queries=32)
    assert {question.place for question in haystack.questions} == {
        needle.place for needle in haystack.needles
    }


def test_a_single_needle_has_no_competitor():
    haystack = build(needles=1, queries=1, templates=("sentence",))
    assert haystack.ids.tobytes().count(b"magic") == 1
    assert haystack.questions[0].answer == haystack.needles[0].fact.value


def test_with_shuffled_values_no_answer_is_where_it_was():
    honest, control = build(queries=50), build(queries=50, shuffle_values=True)
    assert control.shuffled_values and not honest.shuffled_values
    assert honest.questions == control.questions
    value_of = {needle.place: needle.fact.value for needle in control.needles}
    assert all(value_of[question.place] != question.answer for question in control.questions)
    values = [sorted(needle.fact.value for needle in haystack.needles) for haystack in (honest, control)]
    assert values[0] == values[1]  # the same values, with other keys
    assert written(control) == [TEMPLATES[n.template].write(n.fact) for n in control.needles]


def test_shuffling_a_single_needle_changes_its_value():
    control = build(needles=1, queries=1, templates=("key_value",), shuffle_values=True)
    assert control.needles[0].fact.value != control.questions[0].answer


def test_a_haystack_is_a_function_of_its_seed():
    assert np.array_equal(build(seed=1).ids, build(seed=1).ids)
    assert build(seed=1).questions == build(seed=1).questions
    assert not np.array_equal(build(seed=1).ids, build(seed=2).ids)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"length": 16_384, "queries": 33}, "has 32 of each.*more haystacks"),
        ({"needles": 0}, "has 0 of each"),
        ({"needles": 1, "queries": 1}, "has 0 of each"),
        ({"length": 1_000_000}, "Give more text or a shorter length"),
        ({"length": 1000, "needles": 200}, "Take fewer needles or a longer haystack"),
        ({"templates": ()}, "at least one"),
        ({"templates": ("haiku",)}, "must be different ones of.*key_value"),
        ({"templates": ("sentence", "sentence")}, "must be different"),
    ],
)
def test_haystacks_that_cannot_be_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        build(**bad)


# Text


def write_folder(root: Path, files: int = 20, size: int = 1000) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        (root / f"{i:02}.txt").write_bytes((b"file %d says so\n" % i * size)[:size])
    return root


def files_in(text: bytes) -> set[bytes]:
    return {line.split()[1] for line in text.splitlines() if line.startswith(b"file ") and b"says" in line}


def test_text_is_that_of_files_none_twice(tmp_path):
    root = write_folder(tmp_path)
    found = find_text(root, bytes_needed=20_000, seed=0)
    assert (len(found.text), found.files, found.root, found.repeated) == (20_000, 20, root, False)
    pieces = {found.text[i : i + 1000].tobytes() for i in range(0, 20_000, 1000)}
    assert pieces == {path.read_bytes() for path in root.iterdir()}
    assert found.digest == hashlib.sha256(found.text.tobytes()).hexdigest()


def test_reading_stops_when_there_is_enough(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        haystack_text, "digest_file", lambda path, **more: read.append(path) or digest_file(path, **more)
    )
    found = find_text(write_folder(tmp_path), bytes_needed=2500, seed=0)
    assert len(found.text) == 2500 and found.files == len(read) == 3


def test_the_seed_chooses_the_files(tmp_path):
    root = write_folder(tmp_path)
    texts = [find_text(root, bytes_needed=4000, seed=seed).text.tobytes() for seed in (0, 1, 2, 0)]
    assert texts[0] == texts[3]
    chosen = [files_in(text) for text in texts[:3]]
    assert not chosen[0] & chosen[1] and not chosen[0] & chosen[2] and not chosen[1] & chosen[2]


def test_copies_and_files_that_were_trained_on_are_left_out(tmp_path):
    root = write_folder(tmp_path)
    (root / "copy.txt").write_bytes((root / "03.txt").read_bytes())
    trained_on, _ = digest_file(root / "07.txt")
    found = find_text(root, bytes_needed=19_000, seed=0, exclude_digests=[trained_on])
    assert found.files == 19 and b"7" not in files_in(found.text.tobytes())
    with pytest.raises(ValueError, match="19000 bytes of text that was not trained on, and 19001"):
        find_text(root, bytes_needed=19_001, seed=0, exclude_digests=[trained_on])


def test_hidden_files_and_files_that_are_no_text_are_left_out(tmp_path):
    root = write_folder(tmp_path, files=2)
    (root / ".hidden.txt").write_text("x" * 5000)
    (root / "image.png").write_bytes(b"\xff\xd8" * 5000)
    assert find_text(root, bytes_needed=2000, seed=0).files == 2
    with pytest.raises(ValueError, match="repeat=True"):
        find_text(root, bytes_needed=2001, seed=0)


def test_text_is_repeated_only_when_asked_and_says_so(tmp_path):
    root = write_folder(tmp_path, files=2)
    found = find_text(root, bytes_needed=5000, seed=0, repeat=True)
    assert found.repeated and found.files == 2
    assert found.text[:3000].tobytes() == found.text[2000:].tobytes()
    assert not find_text(root, bytes_needed=2000, seed=0, repeat=True).repeated


def test_the_default_is_the_source_of_the_installed_packages():
    found = find_text(None, bytes_needed=200_000, seed=0)
    assert found.root == Path(sysconfig.get_path("purelib"))
    assert b"import " in found.text.tobytes()


def test_folders_without_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_text(tmp_path / "nowhere", bytes_needed=1, seed=0)
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(NotADirectoryError, match="Give the folder"):
        find_text(tmp_path / "file", bytes_needed=1, seed=0)
    with pytest.raises(ValueError, match="holds no text"):
        find_text(tmp_path, bytes_needed=1, seed=0, repeat=True)
