"""Training to learn languages: its loss, its parts, a run that is resumed, its settings, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from language_helpers import code
from needle_helpers import write_text
from test_resume import JITTER, Killed, assert_same_run, stop_at
from train_helpers import write_corpus

from moe.cli import main
from moe.cli_icl import sizes_of
from moe.probes.language.config import LanguageConfig
from moe.probes.language.record import LanguageRecord
from moe.train.data import Windows
from moe.train.loop import train
from moe.train.overrides import load_settings
from moe.train.settings import RunConfig
from moe.train.trainer import Trainer

SMALL = (
    "model.hidden_size=16",
    "model.head_dim=16",
    "model.moe_intermediate_size=8",
    "model.num_experts=4",
    "model.sliding_window=8",
    "data.sequence_length=600",
    "language.most_sentences=4",
    "language.most_filler=100",
    "train.steps=12",
    "train.batch_size=2",
    "train.log_every=5",
    "train.checkpoint_every=5",
    "train.eval_tokens=600",
    "train.final_eval_tokens=600",
    "train.tensorboard=false",
    "optim.warmup_steps=4",
)


def settings(root: Path, *more: str) -> list[str]:
    if not (root / "text").exists():
        write_corpus(root / "text")
    return [*SMALL, f'data.folder="{root / "text"}"', f'data.cache="{root / "cache"}"', *more]


def language_run(root: Path, *more: str) -> RunConfig:
    """The preset language made small."""
    return load_settings("language", None, settings(root, *more))


def trainer_of(root: Path, *more: str) -> Trainer:
    config = language_run(root, *more)
    return Trainer(config, Windows(code(9000), config.data.sequence_length))


def test_the_loss_is_that_of_the_translations_alone(tmp_path):
    trainer = trainer_of(tmp_path, "language.pointer_loss=0.0")
    ids, places, targets, is_answer, *rest = trainer.task.batch(0)
    loss = trainer.task.loss(trainer.model, ids, places, targets, is_answer, *rest)
    logits = trainer.model(ids).logits.gather(1, places[..., None].expand(-1, -1, 256))
    expected = F.cross_entropy(logits[is_answer], targets[is_answer])
    assert torch.allclose(loss.cross_entropy, expected, rtol=1e-4)
    assert torch.allclose(loss.total, expected, rtol=1e-4)


def test_the_pointer_loss_is_added_with_its_weight(tmp_path):
    totals = [
        trainer.task.loss(trainer.model, *trainer.task.batch(1)).total.item()
        for weight in (0.0, 1.0, 2.0)
        for trainer in [trainer_of(tmp_path, f"language.pointer_loss={weight}")]
    ]
    assert totals[1] > totals[0] + 1
    assert np.isclose(totals[2] - totals[1], totals[1] - totals[0], rtol=1e-4)


def test_parts_of_a_batch_have_the_gradient_of_the_whole(tmp_path):
    trainer = trainer_of(tmp_path, "train.accumulation=2", "language.pointer_loss=0.3")
    batch, gradients = trainer.task.batch(2), []
    assert len(batch[0]) % 2 == 0
    for count in (1, 2):
        for part in zip(*(x.chunk(count) for x in batch), strict=True):
            (trainer.task.loss(trainer.model, *part).total / count).backward()
        present = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(present))
        trainer.model.zero_grad()
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_the_loss_falls(tmp_path):
    trainer = trainer_of(tmp_path, "train.steps=60")
    losses = []
    for _ in range(60):
        with torch.no_grad():
            losses.append(trainer.task.loss(trainer.model, *trainer.task.batch(0)).cross_entropy.item())
        trainer.step()
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, accumulation):
    config = language_run(tmp_path, JITTER, f"train.accumulation={accumulation}")
    train(config, tmp_path / "straight")
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped", log=stop_at(5))
    torch.manual_seed(99)
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("language.words=3", "words=3"),
        ("language.most_words=9", "most_words=9 must be at least 11"),
        ("language.letters=[3]", "must be two numbers"),
        ("language.letters=[4, 3]", "letters"),
        ("language.grammar_share=1.5", "is a share"),
        ("language.noise_share=-0.1", "is a share"),
        ("language.partial_share=2", "is a share"),
        ("language.most_sentences=0", "most_sentences=0 must be at least 1"),
        ("language.exercises=0.5", "exercises=0.5 must be from 0 to 0.3"),
        ("language.most_filler=10", "most_filler=10 must be at least 40"),
        ("language.pointer_loss=-1", "is the weight of a loss"),
        ("data.tokenizer=bpe", "vocab_size"),
        ("language.share=0", "language.share=0.* must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        language_run(tmp_path, override)


def test_settings_survive_json(tmp_path):
    config = language_run(tmp_path, "language.letters=[2, 4]")
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.language == LanguageConfig(letters=(2, 4), most_sentences=4, most_filler=100)


def test_a_text_shorter_than_a_document_is_refused(tmp_path):
    config = language_run(tmp_path, "language.most_sentences=40")
    trainer = Trainer(config, Windows(code(601), 600))
    with pytest.raises(ValueError, match="must be longer than a document"):
        for step in range(20):
            trainer.task.batch(step)


# The command


def icl(*words: object) -> int:
    try:
        return main(["icl", *map(str, words)])
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("icl")
    write_text(root / "held")
    assert icl("train", "--out", root / "run", "--device", "cpu", *settings(root)) == 0
    return root


def test_from_training_to_a_table_and_a_figure(root, tmp_path, capsys):
    few = ("--queries", 6, "--languages", 3, "--examples", "0,2", "--folder", root / "held")
    target = tmp_path / "a.json"
    assert icl("eval", root / "run", *few, "--filler", "0,1k", "--json", target) == 0
    shown = capsys.readouterr().out
    assert shown.count("| grammar + dictionary") == 4 and f"figure: {tmp_path / 'a.png'}" in shown
    assert len(LanguageRecord.load(target).rows) == 5 * 2 * 2
    assert icl("eval", root / "run", *few, "--condition", "neither", "--words", 64) == 0
    assert "| 64 " in capsys.readouterr().out
    both = tmp_path / "both.json"
    records = (target, root / "run" / "icl_eval.json")
    assert icl("table", *records, "--json", both, "--figure", tmp_path / "both.png") == 0
    assert len(LanguageRecord.load(both).rows) == 22
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--condition", "both"), "there is no condition 'both'"),
        (("--examples", "99"), "examples=99"),
        (("--languages", "0"), "languages=0"),
        (("--json", "missing/a.json"), "does not exist"),
        (("--filler", "x"), "is no length"),
        (("--filler", "1M", "--folder", "FOLDER"), "are needed"),
    ],
)
def test_what_cannot_be_measured_is_an_error_in_one_line(root, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    folder = str(write_text(tmp_path / "few", files=1, lines=9))
    code = icl("eval", root / "run", *(folder if word == "FOLDER" else word for word in words))
    assert code == 2 and message in capsys.readouterr().err


def test_fillers_may_be_none():
    assert sizes_of("0,64k,1M") == [0, 65536, 2**20]
