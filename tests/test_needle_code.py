"""Where a function is defined: the context holds the answer, and training asks for other functions."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.probes.needle.codebase import build_codebase
from moe.probes.needle.config import NeedleConfig
from moe.probes.needle.definitions import (
    LONGEST_NAME,
    Definitions,
    annotate,
    defined_names,
    find_definitions,
    path_value,
)
from moe.probes.needle.needles import DEFINITION, LONGEST_PATH, Fact
from moe.probes.needle.training import predicted_places, training_batch
from moe.train.corpus import digest_file, find_corpus
from moe.train.settings import DataConfig

TEXT = np.frombuffer(b"".join(b"line %d: real text\n" % i for i in range(4000)), np.uint8)
SOURCE = b"""
def plain(x, y=0):
    return x

class A:
    async def waits(self) -> None: ...
    def  spaced (self): return self.undefined(1)

def twice(): ...
def twice(): ...
def
"""


def write_package(root: Path, files: int = 12, functions: int = 10) -> Path:
    for i in range(files):
        path = root / "pkg" / f"part{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        names = [f"job_{i}_{j}" for j in range(functions)] + ["everywhere"]
        path.write_text("".join(f"def {name}(x):\n    return everywhere(x)\n\n\n" for name in names))
    return root / "pkg"


def some_definitions(count: int = 200) -> Definitions:
    return Definitions.of(
        Fact(b"do_%03d" % i, path_value(f"folder{i % 3}/file{i % 17}.py")) for i in range(count)
    )


def draw(definitions: Definitions, count: int, *, keys: float = 0.0, values: float = 0.0) -> list[Fact]:
    rng = np.random.default_rng(0)
    return definitions.draw(rng, count, near_duplicate_keys=keys, near_duplicate_values=values)


# Source


def test_names_are_found_as_often_as_they_are_defined():
    assert defined_names(SOURCE) == [b"plain", b"waits", b"spaced", b"twice", b"twice"]


def test_every_definition_carries_its_path():
    lines = annotate(SOURCE, "pkg/a.py").split(b"\n")
    assert [line for line in lines if line.lstrip().startswith((b"def ", b"async "))] == [
        b"def plain(  # pkg/a.py",
        b"    async def waits(  # pkg/a.py",
        b"    def spaced(  # pkg/a.py",
        b"def twice(  # pkg/a.py",
        b"def twice(  # pkg/a.py",
    ]


def test_annotated_source_is_the_same_python():
    for name in ("decoder", "scanner", "tool"):  # the encoder has an example in a docstring
        source = Path(json.__file__).with_name(f"{name}.py").read_bytes()
        annotated = annotate(source, "json/x.py")
        assert annotated.count(b"  # json/x.py\n") == len(defined_names(source)) > 0
        assert ast.dump(ast.parse(annotated)) == ast.dump(ast.parse(source))


# A package as context


def test_a_question_about_a_package_is_answered_in_it(tmp_path):
    haystack = build_codebase(write_package(tmp_path), queries=30, seed=0)
    raw = haystack.ids.tobytes()
    assert len({question.place for question in haystack.questions}) == 30
    for question in haystack.questions:
        name = question.query.removeprefix(b"# where is def ").removesuffix(b"? ")
        needle = b"def " + name + b"(  # " + question.answer
        assert raw[question.place :].startswith(needle) and raw.count(b"def " + name + b"(") == 1
        assert question.answer.endswith(b".py\n") and question.template == "definition"
        assert (tmp_path / question.answer.decode().strip()).read_bytes().count(b"def " + name + b"(") == 1
        assert question.depth == question.place / len(raw)


def test_the_context_is_the_whole_package_file_after_file(tmp_path):
    package = write_package(tmp_path)
    raw = build_codebase(package, queries=1, seed=0).ids.tobytes()
    files = sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix())
    assert raw == b"".join(
        annotate(path.read_bytes(), path.relative_to(tmp_path).as_posix()) for path in files
    )


def test_only_names_that_are_defined_once_are_asked_for(tmp_path):
    package = write_package(tmp_path)
    haystack = build_codebase(package, queries=120, seed=0)
    assert {needle.fact.key for needle in haystack.needles} == {
        b"job_%d_%d" % (i, j) for i in range(12) for j in range(10)
    }
    with pytest.raises(ValueError, match="defines only 120 names exactly once"):
        build_codebase(package, queries=121, seed=0)


def test_functions_of_files_that_were_trained_on_are_not_asked_for(tmp_path):
    package = write_package(tmp_path)
    trained_on, _ = digest_file(package / "part0" / "module3.py")
    whole = build_codebase(package, queries=1, seed=0)
    haystack = build_codebase(package, queries=110, seed=0, exclude_digests=[trained_on])
    assert np.array_equal(haystack.ids, whole.ids)  # they stay in the context
    assert b"pkg/part0/module3.py\n" not in {question.answer for question in haystack.questions}


def test_questions_about_a_package_are_balanced_over_the_depth(tmp_path):
    haystack = build_codebase(write_package(tmp_path), queries=50, seed=0)
    assert Counter(question.quintile for question in haystack.questions) == dict.fromkeys(range(5), 10)


def test_the_seed_chooses_the_questions_and_not_the_context(tmp_path):
    package = write_package(tmp_path)
    first, again, other = (build_codebase(package, queries=9, seed=seed) for seed in (0, 0, 1))
    assert first.questions == again.questions != other.questions
    assert np.array_equal(first.ids, other.ids)


def test_packages_that_cannot_be_asked_about_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        build_codebase(tmp_path / "nowhere", queries=1, seed=0)
    (tmp_path / "six.py").write_text("x = 1\n")
    with pytest.raises(NotADirectoryError, match="a package that is a folder"):
        build_codebase(tmp_path / "six.py", queries=1, seed=0)
    with pytest.raises(ValueError, match="defines only 0 names"):
        build_codebase(tmp_path, queries=1, seed=0)
    with pytest.raises(ValueError, match="queries=0"):
        build_codebase(tmp_path, queries=0, seed=0)


# Training on other code


def test_definitions_are_the_names_that_the_corpus_defines_once(tmp_path):
    package = write_package(tmp_path)
    (package / "long.py").write_text(f"def {'x' * (LONGEST_NAME + 1)}(): ...\ndef short(): ...\n")
    corpus = find_corpus(DataConfig(folder=str(tmp_path)))
    definitions = find_definitions(corpus.train + corpus.validation, corpus.root)
    assert len(definitions.facts) == 121
    assert Fact(b"short", b"pkg/long.py\n") in definitions.facts
    assert Fact(b"job_4_2", b"pkg/part1/module4.py\n") in definitions.facts


@given(st.integers(0, 60), st.floats(0, 1), st.floats(0, 1))
def test_facts_are_drawn_once(count, keys, values):
    definitions = some_definitions(40)
    facts = draw(definitions, count, keys=keys, values=values)
    assert len(set(facts)) == len(facts) == min(count, 40) and set(facts) <= set(definitions.facts)


def test_near_duplicates_are_neighbours_by_name_or_by_path():
    definitions = some_definitions(2000)
    place = {fact: i for i, fact in enumerate(definitions.facts)}
    places = {place[fact] for fact in draw(definitions, 100, keys=0.3)}
    assert 20 < sum(i - 1 in places for i in places) < 45
    places = {place[fact] for fact in draw(definitions, 100)}
    assert sum(i - 1 in places for i in places) < 15  # by chance
    paths = Counter(fact.value for fact in draw(definitions, 30, values=1.0))
    assert len(paths) < 12 < len(Counter(fact.value for fact in draw(definitions, 30)))


@given(st.integers(0, 30), st.integers(0, 1000))
def test_files_move_together_into_made_up_folders(count, seed):
    definitions = some_definitions(40)
    facts = draw(definitions, count)
    moved = definitions.move_deeper(np.random.default_rng(seed), facts)
    assert [fact.key for fact in moved] == [fact.key for fact in facts]
    above = {new.value.removesuffix(old.value) for old, new in zip(facts, moved, strict=True)}
    assert len(above) <= 1 and all(re.fullmatch(rb"(\w+/){0,3}", one) for one in above)
    assert all(len(fact.value) <= LONGEST_PATH for fact in moved)


def test_paths_reach_the_length_of_real_ones():
    definitions, rng = some_definitions(), np.random.default_rng(0)
    facts = definitions.facts[:20]
    lengths = {len(definitions.move_deeper(rng, facts)[0].value) for _ in range(99)}
    assert min(lengths) == len(facts[0].value) and max(lengths) >= len(facts[0].value) + 18


@pytest.mark.parametrize("templates", [("definition",), ("key_value", "sentence", "definition")])
@pytest.mark.parametrize("length", [512, 2048])
def test_every_byte_of_a_path_points_at_its_needle(templates, length):
    config, definitions = NeedleConfig(templates=templates), some_definitions()
    asked = 0
    for step in range(8):
        batch = training_batch(
            TEXT, config, length=length, batch=2, seed=0, step=step, definitions=definitions
        )
        assert batch.places.shape == (2, predicted_places(config, length))
        for ids, places, targets, pointers in zip(
            batch.ids, batch.places, batch.targets, batch.pointers, strict=True
        ):
            row = bytes(ids.tolist())
            target_at, pointer_at = (
                dict(zip(places.tolist(), x.tolist(), strict=True)) for x in (targets, pointers)
            )
            for query in re.finditer(rb"# where is def (\w+)\? ([^\n]*\n)", row):
                needle = row.index(DEFINITION.write(Fact(query[1], query[2])))
                start = needle + DEFINITION.value_start(query[1])
                assert needle < query.start()
                for i, byte in enumerate(query[2]):
                    place = query.start(2) + i - 1
                    assert (target_at[place], pointer_at[place]) == (byte, start + i)
                asked += 1
            assert (pointers >= 0).any()
    assert asked > 0


def test_the_template_needs_definitions():
    with pytest.raises(ValueError, match="find_definitions"):
        training_batch(TEXT, NeedleConfig(templates=("definition",)), length=512, batch=1, seed=0, step=0)
    with pytest.raises(ValueError, match="Give more Python source"):
        Definitions.of([])


def test_the_longest_path_fits_into_the_shortest_sequence():
    config = NeedleConfig(templates=("definition",), text_share=0)
    longest = Definitions.of(Fact(b"do_%03d" % i, path_value("x" * 56 + ".py")) for i in range(9))
    batch = training_batch(
        TEXT, config, length=config.least_length, batch=9, seed=0, step=0, definitions=longest
    )
    assert batch.is_answer.any(1).all()


def test_few_definitions_leave_room_for_text():
    config = NeedleConfig(templates=("definition",))
    batch = training_batch(
        TEXT, config, length=2048, batch=1, seed=0, step=0, definitions=some_definitions(3)
    )
    assert bytes(batch.ids[0].tolist()).count(b"# where is def ") == 3
