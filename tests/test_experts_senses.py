"""`sparse-moe experts --modalities`: which experts each sense goes to, in a haystack of held-out needles."""

from pathlib import Path

import pytest
from senses_helpers import handwriting, senses_run  # noqa: F401  # the fixture is for all tests here
from train_helpers import tiny_run

from moe.cli import main
from moe.probes.specialisation.record import SpecialisationRecord
from moe.train.loop import train


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("senses")


@pytest.fixture
def run(root) -> Path:
    """A run of the small preset; it needs the made-up handwriting, and so cannot be made once a file."""
    out = root / "run"
    if not out.exists():
        train(senses_run(root), out)
    return out


def test_the_senses_of_a_haystack_are_the_labels(run, capsys):
    command = ["experts", str(run), "--modalities", "--tokens=6000", "--permutations=49"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "a haystack of 6,000 tokens" in printed and "| 0     | audio |" in printed
    record = SpecialisationRecord.load(run / "experts.json")
    assert record.found.labels == ("text", "image", "video", "audio")
    assert sum(record.found.tokens) == 6000 and min(record.found.tokens) > 100
    assert [control.tokens for control in record.untrained] == [record.found.tokens] * 3
    assert record.texts["haystack"]["tokens"] == 6000 and record.texts["haystack"]["text"]["digest"]
    for layer in record.found.layers:
        assert layer.by_block.p_value == 0.02 and layer.by_ids is None
    assert str(run.parent) not in (run / "experts.json").read_text()


def test_a_run_of_text_alone_and_domains_beside_modalities_are_refused(tmp_path, run, capsys):
    train(tiny_run(tmp_path), tmp_path / "run")
    assert main(["experts", str(tmp_path / "run"), "--modalities"]) == 2
    assert "reads text alone" in capsys.readouterr().err
    assert main(["experts", str(run), "--modalities", "--domain=a=b"]) == 2
    assert "two questions" in capsys.readouterr().err
