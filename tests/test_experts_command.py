"""The command `sparse-moe experts`: texts of domains, the record, the tables and the figure."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from train_helpers import tiny_run

from moe.cli import main, parse
from moe.probes.specialisation.counts import RoutingCounts
from moe.probes.specialisation.domains import (
    Source,
    default_sources,
    domain_batches,
    read_domain,
    read_domains,
)
from moe.probes.specialisation.measure import specialisation, specialisation_of, untrained
from moe.probes.specialisation.record import (
    SpecialisationRecord,
    information_table,
    shares_table,
    untrained_range,
    verdict,
)
from moe.routing import Routing
from moe.train.corpus import digest_file
from moe.train.loop import train
from moe.train.runs import open_run
from moe.train.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def write_files(folder: Path, *texts: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        content = text.encode() if isinstance(text, str) else text
        (folder / f"{number}.txt").write_bytes(content)
    return folder


def lines(word: str, count: int = 300) -> str:
    return "".join(f"{word} {number}\n" for number in range(count))


def test_every_file_gives_one_sequence_before_one_gives_two(tmp_path):
    folder = write_files(tmp_path / "a", *(lines(f"file {n}", 100) for n in range(5)))
    one = read_domain(Source(folder), BYTES, tokens=5 * 64, sequence_length=64)
    assert sorted(one.file_of) == [0, 1, 2, 3, 4] and one.files == 5
    assert all(len(sequence) == 64 for sequence in one.sequences)
    three = read_domain(Source(folder), BYTES, tokens=15 * 64, sequence_length=64)
    assert Counter(three.file_of) == dict.fromkeys(range(5), 3)
    assert three.tokens == 15 * 64
    texts = [path.read_bytes() for path in folder.iterdir()]
    taken = [sequence.tobytes() for sequence in three.sequences]
    assert all(any(part in text for text in texts) for part in taken)
    assert len(set(taken)) == 15, "no text is taken twice"


def test_the_seed_chooses_the_text(tmp_path):
    folder = write_files(tmp_path / "a", *(lines(f"file {n}", 100) for n in range(5)))
    digests = [
        read_domain(Source(folder), BYTES, tokens=200, sequence_length=50, seed=seed).digest
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_copies_excluded_files_and_what_is_no_text_are_left_out(tmp_path):
    folder = write_files(tmp_path / "a", "one" * 50, "one" * 50, "two" * 50, b"\xff\xfe" * 50, "  \n", "")
    digest, _ = digest_file(folder / "2.txt")
    text = read_domain(Source(folder), BYTES, tokens=150, sequence_length=500, exclude_digests={digest})
    assert [sequence.tobytes() for sequence in text.sequences] == [b"one" * 50]
    with pytest.raises(ValueError, match=r"holds 150 tokens .* and 151 are needed"):
        read_domain(Source(folder), BYTES, tokens=151, sequence_length=500, exclude_digests={digest})


def test_suffixes_choose_files_and_a_header_is_skipped(tmp_path):
    folder = tmp_path / "lib" / "x.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Name: x\nVersion: 1\n\nWhat x is for.\n\nMuch.")
    (folder / "LICENSE").write_text("You may." * 20)
    text = read_domain(
        Source(tmp_path / "lib", ("METADATA",), has_header=True), BYTES, tokens=9, sequence_length=100
    )
    assert [sequence.tobytes() for sequence in text.sequences] == [b"What x is for.\n\nMuch."]


def test_a_character_that_the_limit_cuts_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("moe.probes.specialisation.domains.MOST_BYTES", 5)
    folder = write_files(tmp_path / "a", "ééé")
    text = read_domain(Source(folder), BYTES, tokens=1, sequence_length=100)
    assert text.sequences[0].tobytes() == "éé".encode()


def test_batches_hold_every_token_once_with_its_label_and_file(tmp_path):
    a = write_files(tmp_path / "a", *(lines(f"file {n}", 10) for n in range(3)), "short")
    b = write_files(tmp_path / "b", *(lines(f"other {n}", 10) for n in range(3)))
    texts = [read_domain(Source(one), BYTES, tokens=190, sequence_length=64) for one in (a, b)]
    batches = list(domain_batches(texts, torch.device("cpu")))
    assert {len(row) for batch in batches for row in batch.inputs} == {5, 64}
    rows: list[tuple[int, int, bytes]] = []
    for batch in batches:
        assert batch.documents is not None and batch.mask is None
        for ids, label, document in zip(batch.inputs, batch.labels, batch.documents, strict=True):
            rows.append((int(label), int(document), bytes(ids.tolist())))
    expected = [
        (y, y * texts[0].files + file, sequence.tobytes())
        for y, text in enumerate(texts)
        for file, sequence in zip(text.file_of, text.sequences, strict=True)
    ]
    assert sorted(rows) == sorted(expected)
    assert not {d for y, d, _ in rows if y == 0} & {d for y, d, _ in rows if y == 1}
    assert len({d for _, d, _ in rows}) == sum(text.files for text in texts)


def test_the_default_domains_are_on_this_machine():
    sources = default_sources()
    assert list(sources) == ["python", "c++", "prose"]
    texts = read_domains(sources, lambda source: read_domain(source, BYTES, tokens=3000, sequence_length=256))
    text = {name: b"".join(s.tobytes() for s in one.sequences) for name, one in texts.items()}
    assert b"self" in text["python"] and b"::" in text["c++"] and b" the " in text["prose"]
    assert b"Metadata-Version" not in text["prose"]


def test_folders_that_cannot_be_read_are_named_with_their_domain(tmp_path):
    folder = write_files(tmp_path / "a", lines("text"))

    def read(source):
        return read_domain(source, BYTES, tokens=100, sequence_length=50)

    with pytest.raises(FileNotFoundError, match=r"domain 'y': .*does not exist"):
        read_domains({"x": Source(folder), "y": Source(tmp_path / "none")}, read)
    with pytest.raises(NotADirectoryError, match=r"domain 'y': .*is a file"):
        read_domains({"x": Source(folder), "y": Source(folder / "0.txt")}, read)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"domain 'y': .*holds 0 tokens"):
        read_domains({"x": Source(folder), "y": Source(tmp_path / "empty")}, read)
    with pytest.raises(ValueError, match="at least two"):
        read_domains({"x": Source(folder)}, read)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run of 12 steps, and two domains of other words."""
    root = tmp_path_factory.mktemp("experts")
    train(tiny_run(root), root / "run")
    write_files(root / "lower", *(lines(f"the lower case {n}", 40) for n in range(8)))
    write_files(root / "upper", *(lines(f"UPPER 12345 {n}", 40) for n in range(8)))
    return root


def command(root: Path, *more: str) -> list[str]:
    domains = [f"--domain=lower={root / 'lower'}", f"--domain=upper={root / 'upper'}"]
    return ["experts", str(root / "run"), *domains, "--tokens=1000", "--permutations=49", *more]


def test_the_command_prints_writes_and_draws(root, capsys):
    pytest.importorskip("matplotlib")
    assert main(command(root)) == 0
    printed = capsys.readouterr().out
    record = SpecialisationRecord.load(root / "run" / "experts.json")
    found, run = record.found, open_run(root / "run")
    assert found.labels == ("lower", "upper")
    assert [layer.layer for layer in found.layers] == list(run.model.moe_layers)
    for line in [
        *information_table(found, record.untrained),
        *shares_table(found),
        verdict(found, record.untrained),
    ]:
        assert line in printed
    assert (record.run, record.step) == ("run", 12)
    assert record.environment["versions"]["torch"] and record.environment["date"]
    assert record.texts["lower"]["folder"] == "lower" and record.texts["lower"]["files"] == 8
    assert str(root) not in (root / "run" / "experts.json").read_text(), "a record names no path"
    for layer in found.layers:  # these domains share hardly a byte
        assert layer.by_block.p_value == 0.02 and layer.mutual_information > layer.by_block.quantile_99
        assert layer.by_ids is not None and layer.by_ids < layer.mutual_information * 1.01
        assert layer.dropped == 0 and sum(layer.load) == pytest.approx(1)
    picture = (root / "run" / "experts.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_the_same_command_gives_the_same_numbers(root, tmp_path):
    assert main(command(root, f"--json={tmp_path / 'a.json'}")) == 0
    assert main(command(root, f"--json={tmp_path / 'b.json'}")) == 0
    assert main(command(root, f"--json={tmp_path / 'c.json'}", "--seed=1")) == 0
    a, b, c = (json.loads((tmp_path / f"{name}.json").read_text())["found"] for name in "abc")
    assert a == b != c


def test_the_decoder_sees_each_sequence_alone(root):
    """What the command counts is what the routings of each sequence by itself are."""
    run = open_run(root / "run")
    length = run.config.data.sequence_length
    texts = [
        read_domain(Source(root / name), BYTES, tokens=600, sequence_length=length)
        for name in ("lower", "upper")
    ]
    counted, alone = RoutingCounts("ab"), RoutingCounts("ab")
    with torch.inference_mode():
        for batch in domain_batches(texts, run.device):
            counted.add(run.model.hidden(batch.inputs).routings, batch.labels)
        for label, text in enumerate(texts):
            for sequence in text.sequences:
                ids = torch.from_numpy(sequence.astype(np.int64))[None]
                alone.add(run.model.hidden(ids).routings, torch.tensor([label]))
    assert (counted.slots - alone.slots).abs().sum() <= 2  # near ties, in another order of sums
    assert counted.tokens.tolist() == alone.tokens.tolist()


def test_the_control_is_the_model_before_training(root, capsys):
    assert main(command(root, "--controls=0")) == 0
    assert SpecialisationRecord.load(root / "run" / "experts.json").untrained == ()
    run = open_run(root / "run")
    state = torch.random.get_rng_state()
    first, again, other = (untrained(run.model, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.head_weight, again.head_weight)
    assert not torch.equal(first.head_weight, other.head_weight)
    assert first.config == run.model.config and not first.training
    assert main(command(root, "--controls=2")) == 0
    record = SpecialisationRecord.load(root / "run" / "experts.json")
    texts = [
        read_domain(Source(root / name), BYTES, tokens=1000, sequence_length=run.config.data.sequence_length)
        for name in ("lower", "upper")
    ]
    for model, control in zip((first, other), record.untrained, strict=True):
        batches = domain_batches(texts, run.device)
        assert control == specialisation_of(model, batches, labels=("lower", "upper"), permutations=1)
    assert record.untrained[0] != record.untrained[1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tokens=100000"], "domain 'lower': .* and 100000 are needed"),
        (["--tokens=0"], "tokens=0 must be at least 1"),
        (["--permutations=0"], "permutations=0 must be at least 1"),
        (["--controls=-1"], "controls=-1 must be at least 0"),
        (["--json=x.txt"], "must end in .json"),
        (["--json=none/x.json"], "does not exist"),
        (["--domain=lower=elsewhere"], "given twice"),
        (["--checkpoint=step_9"], "no checkpoint 'step_9'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(root, capsys, more, words):
    assert main(command(root, *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(words, error)


def test_text_that_was_trained_on_is_no_domain(root, capsys):
    assert (
        main(["experts", str(root / "run"), f"--domain=a={root / 'text'}", f"--domain=b={root / 'upper'}"])
        == 2
    )
    assert "domain 'a'" in (error := capsys.readouterr().err) and "holds 0 tokens" in error


def test_a_dense_run_has_no_experts(tmp_path, capsys):
    train(tiny_run(tmp_path, "model.num_experts=0", "model.intermediate_size=32"), tmp_path / "run")
    assert main(["experts", str(tmp_path / "run")]) == 2
    assert "has no MoE layer" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["code", "=folder", "code=", ""])
def test_a_domain_is_a_name_and_a_folder(text, capsys):
    with pytest.raises(SystemExit):
        parse(["experts", "run", f"--domain={text}"])
    assert "NAME=FOLDER" in capsys.readouterr().err


def some_counts(labels=("text", "image", "audio"), experts: int = 6, layers: int = 4) -> RoutingCounts:
    counts = RoutingCounts(labels)
    chosen = torch.rand(60, experts).topk(2).indices
    chosen[:20, 0] = 0
    scores = torch.zeros(60, experts)
    route = Routing(scores, scores, chosen, torch.ones(60, 2))
    counts.add([route] * layers, torch.tensor([0] * 20 + [1] * 40).reshape(12, 5))
    return counts


@pytest.mark.parametrize("control", [0, 2])
def test_a_record_is_read_back_as_it_was(tmp_path, control):
    found = specialisation(some_counts(), permutations=9)
    fresh = (specialisation(some_counts(), permutations=9),) * control
    record = SpecialisationRecord("run", 5, 64, 0, {"text": {}}, found, fresh, {"device": "cpu"})
    record.save(tmp_path / "a.json")
    assert SpecialisationRecord.load(tmp_path / "a.json") == record
    (tmp_path / "b.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"b\.json is no record of `sparse-moe experts`"):
        SpecialisationRecord.load(tmp_path / "b.json")


def test_the_verdict_counts_layers():
    found = specialisation(some_counts(), permutations=9)
    assert "in 4 of 4 MoE layers (largest p 0.1, least possible 0.1)" in verdict(found)
    assert verdict(found, [found]).endswith("more than in any of 1 untrained models in 0 of 4")
    empty = RoutingCounts("ab")
    route = Routing(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([[0], [0]]), torch.ones(2, 1))
    empty.add([route] * 4, torch.tensor([0, 1]))
    nothing = specialisation(empty, permutations=9)
    assert "in 0 of 4 MoE layers (largest p 1" in verdict(nothing)
    assert verdict(found, [nothing]).endswith("in any of 1 untrained models in 4 of 4")
    assert verdict(found, [nothing, found]).endswith("in any of 2 untrained models in 0 of 4")
    more = f"{found.layers[0].mutual_information:.4f}"
    assert untrained_range([found, nothing], 0) == f"0.0000 to {more}"
    assert untrained_range([found], 1) == more and untrained_range([], 0) == "-"


def test_the_figure_has_a_panel_for_every_layer_and_shows_what_is_empty():
    pytest.importorskip("matplotlib")
    from moe.report.specialisation import specialisation_figure

    found = specialisation(some_counts(), permutations=9)
    fresh = specialisation(some_counts(), permutations=9)
    figure = specialisation_figure(found, "run", [fresh])
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 4
    for axes, layer in zip(panels, found.layers, strict=True):
        assert f"layer {layer.layer}: {layer.mutual_information:.4f} bits" in axes.get_title()
        assert f"{layer.by_block.quantile_99:.4f}" in axes.get_title()
        assert f"untrained {fresh.layers[0].mutual_information:.4f}" in axes.get_title()
        (mesh,) = axes.collections
        colours = np.ma.asarray(mesh.get_array()).reshape(3, 6)
        assert np.ma.getmaskarray(colours)[2].all() and not np.ma.getmaskarray(colours)[:2].any()
        assert len(axes.texts) == 12  # no number where there is no slot
        assert colours[0, 0] > 0 > colours[1, 0], "expert 0 has more of label 0"
    assert "-" in shares_table(found)[4]


def test_a_figure_of_many_experts_has_no_numbers():
    pytest.importorskip("matplotlib")
    from moe.report.specialisation import specialisation_figure

    figure = specialisation_figure(specialisation(some_counts(experts=64, layers=1), permutations=9), "run")
    panel = next(axes for axes in figure.axes if axes.get_title())
    assert not panel.texts and len(panel.get_xticks()) == 8
