"""Several needles at once, where functions are defined, and loss by context: answered, counted, refused."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from needle_helpers import Oracle, oracle_run, write_text

from moe.probes.needle import evaluate
from moe.probes.needle.evaluate_code import check_code, evaluate_code, find_package
from moe.probes.needle.evaluate_several import check_several, evaluate_several, several_table
from moe.probes.needle.positions import (
    TARGETS,
    average,
    check_positions,
    contexts_up_to,
    losses_by_context,
    positions_table,
)
from moe.probes.needle.questions import Questions
from moe.probes.statistics import lower_bound

LENGTH = 16_384


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("needle")
    write_text(root / "text")
    return root


@pytest.fixture
def questions(root) -> Questions:
    return Questions(queries=24, haystacks=2, folder=root / "text")


# Several needles


def test_a_model_that_knows_finds_several_needles_at_once(root, questions):
    bars, lines = [], []
    results = evaluate_several(
        oracle_run(root),
        questions,
        LENGTH,
        progress=lambda done, total, seconds: bars.append((done, total)),
        answered=lambda done, total, seconds: bars.append((done, total)),
        log=lines.append,
    )
    found = {result.task: (result.right, result.asked, result.needles) for result in results}
    assert found == {"multi-query": (24, 24, 64), "multi-value": (24, 24, 64), "hundred": (200, 200, 100)}
    for result in results:
        assert (result.run, result.step, result.length, result.haystacks) == ("oracle", 7, LENGTH, 2)
        assert result.recall == 1 and result.lower_bound == lower_bound(result.right, result.asked)
    assert bars.count((3, 3)) == 4 and bars.count((1, 1)) == 2 and bars.count((LENGTH, LENGTH)) == 6
    assert lines[0] == "haystack 1, multi-query: 12/12 right" and len(lines) == 6


class Forgetful(Oracle):
    """Answers the first query of a suffix, and writes zeros after the others."""

    def next(self, text: bytes, suffix: bytes) -> int:
        return super().next(text, suffix) if b"\n" not in suffix else ord("0")


def test_answers_of_one_suffix_count_one_by_one(root, questions):
    results = evaluate_several(oracle_run(root, model=Forgetful), questions, LENGTH)
    assert [(result.right, result.asked) for result in results] == [(6, 24), (6, 24), (2, 200)]


class Repetitive(Oracle):
    """Gives the first value of a key again and again."""

    def next(self, text: bytes, suffix: bytes) -> int:
        return super().next(text, suffix.split(b"\n")[-1])


def test_the_same_value_again_is_not_another_value(root, questions):
    results = evaluate_several(oracle_run(root, model=Repetitive), questions, LENGTH)
    assert [(result.right, result.asked) for result in results] == [(24, 24), (6, 24), (200, 200)]


def test_the_table_of_several_needles_has_a_line_for_each_task(root, questions, tmp_path):
    short = replace(questions, folder=write_text(tmp_path, files=1, lines=20), repeat=True)
    lines = several_table(evaluate_several(oracle_run(root, model=Forgetful), short, LENGTH))
    assert len(lines) == 5 and all("REPEATED text" in line for line in lines[2:])
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[1:8] == ["oracle", "multi-value", "16k", "2 x 64", "6/24", "25.0", "11.4"]


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({"queries": 600}, LENGTH, "need 300 needles, and the haystack has 64"),
        ({"needles": 16}, 2048, "100 needles have"),
        ({"needles": 10}, LENGTH, "need 12 needles"),
    ],
)
def test_several_needles_that_are_not_there_are_refused_before(root, questions, changes, length, message):
    run = oracle_run(root)
    with pytest.raises(ValueError, match=message):
        check_several(run, replace(questions, **changes), length)
    assert run.model.read == 0


# Code


def write_package(root, files: int = 10):
    package = root / "pack"
    package.mkdir()
    for i in range(files):
        names = [f"job_{i}_{j}" for j in range(6)] + ["everywhere"]
        (package / f"m{i}.py").write_text("".join(f"def {name}(x):\n    return x\n\n" for name in names))
    return package


def code_run(root):
    return oracle_run(root, 'needle.templates=["key_value", "sentence", "definition"]')


def test_a_model_that_knows_finds_every_function(root, questions, tmp_path):
    row = evaluate_code(code_run(root), replace(questions, queries=60), write_package(tmp_path))
    assert (row.right, row.asked, row.template, row.needles, row.haystacks) == (60, 60, "definition", 60, 1)
    assert row.text["root"] == "pack" and row.text["files"] == 10 and not row.text["repeated"]
    assert [part.asked for part in row.quintiles] == [12] * 5


def test_code_that_cannot_be_asked_about_is_refused_before(root, questions, tmp_path, monkeypatch):
    package = write_package(tmp_path)
    with pytest.raises(ValueError, match="sparse-moe needle train --variant code"):
        check_code(oracle_run(root), questions, package)
    run = code_run(root)
    check_code(run, questions, package)
    with pytest.raises(ValueError, match="defines only 60 names"):
        check_code(run, replace(questions, queries=61), package)
    monkeypatch.setattr(evaluate, "memory_available", lambda device: evaluate.BESIDE_CACHE)
    with pytest.raises(ValueError, match="0 would fit"):
        check_code(run, questions, package)
    assert run.model.read == 0


def test_a_package_is_found_by_its_name_or_its_folder(tmp_path, monkeypatch):
    assert (find_package("numpy") / "__init__.py").is_file()
    assert find_package(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert find_package("mine") == tmp_path / "mine"  # absolute, so that its files have a name in it
    for name in ("no_such_package", "no.such", "this", "", "a b", "..x"):  # `this` is a single file
        with pytest.raises(ValueError, match="is no installed package that has a folder"):
            find_package(name)


# Positions


class Parrot(Oracle):
    """Expects the byte that it just read once more, and more firmly after a longer context."""

    def model(self, ids, mask, cache, at):
        assert cache is not None
        before = cache.length
        cache.append(0, ids[:, None, :, None].float())
        cache.advance(ids.shape[1], None)
        count = ids.shape[1] if at is None else at
        states = torch.nn.functional.one_hot(ids[:, ids.shape[1] - count :], 256).float()
        return SimpleNamespace(states=states * firmness(before))


def firmness(context: int) -> float:
    return -math.log2(context + 1) / 4  # in code a byte is rarely the one before


def test_the_loss_after_each_context_is_that_of_the_same_bytes(root, questions):
    result = losses_by_context(oracle_run(root, model=Parrot), questions, 4096, spots=3)
    assert [one.context for one in result.losses] == [0, 512, 4096]
    assert (result.run, result.step, result.spots, result.bytes_a_spot) == ("oracle", 7, 3, TARGETS - 1)
    run, pairs = oracle_run(root), []
    for seed in range(3):
        text = questions.text(run, 4096 + TARGETS, seed).text[-TARGETS:]
        pairs.append((text[1:] == text[:-1]).mean())
    for one in result.losses:
        strength = firmness(one.context)
        spots = [math.log(math.exp(strength) + 255) - strength * share for share in pairs]
        assert one.loss == pytest.approx(sum(spots) / 3, rel=1e-5)


def test_changes_are_paired_spot_by_spot():
    first, second, third = average([0, 512, 4096], [[3.0, 1.0], [2.5, 0.5], [2.5, 0.9]])
    assert (first.loss, first.change, first.change_stderr) == (2.0, None, None)
    assert first.stderr == pytest.approx(1.0)
    assert (second.loss, second.change, second.change_stderr) == (1.5, -0.5, 0.0)
    assert (third.change, third.change_stderr) == pytest.approx((0.2, 0.2))
    (alone,) = average([512], [[3.0]])
    assert (alone.loss, alone.stderr) == (3.0, 0.0)


def test_contexts_end_with_the_longest_one():
    assert contexts_up_to(100) == [0, 100]
    assert contexts_up_to(512) == [0, 512]
    assert contexts_up_to(65_536) == [0, 512, 4096, 32_768, 65_536]
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        contexts_up_to(0)


def test_the_table_of_losses_has_a_line_for_each_context(root, questions):
    result = losses_by_context(oracle_run(root, model=Parrot), questions, 512, spots=2)
    lines = positions_table([result, replace(result, repeated=True)])
    assert len(lines) == 6
    assert re.search(r"\| oracle +\| 0 +\| 5\.545\d \+- 0\.0000 \| +\| 2 x 511 +\|", lines[2])
    assert re.search(r"512 +\| [\d.]+ \+- [\d.]+ \| [-+][\d.]+ \+- [\d.]+ \| 2 x 511 REPEATED text", lines[5])


def test_losses_that_cannot_be_measured_are_refused_before(root, questions, tmp_path, monkeypatch):
    run = oracle_run(root)
    with pytest.raises(ValueError, match="spots=0 must be at least 1"):
        check_positions(run, questions, 512, 0)
    short = replace(questions, folder=write_text(tmp_path, files=1, lines=20))
    with pytest.raises(ValueError, match="repeat=True"):
        check_positions(run, short, 512, 3)
    assert losses_by_context(
        oracle_run(root, model=Parrot), replace(short, repeat=True), 512, spots=1
    ).repeated
    monkeypatch.setattr(evaluate, "memory_available", lambda device: evaluate.BESIDE_CACHE)
    with pytest.raises(ValueError, match="0 would fit"):
        check_positions(run, questions, 512, 3)
    assert run.model.read == 0
