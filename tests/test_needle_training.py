"""Training to find needles: its loss, its parts, a run that is killed and resumed, and its settings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_resume import JITTER, Killed, assert_same_run, log_of, stop_at
from torch import Tensor
from train_helpers import tiny_run, write_corpus

from moe.cross_entropy import IGNORED
from moe.probes.needle.config import NeedleConfig
from moe.probes.needle.training import training_batch
from moe.train.data import Windows
from moe.train.loop import train
from moe.train.overrides import change, load_settings
from moe.train.settings import RunConfig, differences
from moe.train.trainer import Trainer

SMALL = (
    "model.hidden_size=16",
    "model.head_dim=16",
    "model.moe_intermediate_size=8",
    "model.num_experts=4",
    "model.sliding_window=8",
    "data.sequence_length=200",
    "needle.templates=['key_value']",
    "needle.short_length=90",
    "needle.short_fraction=0.5",
    "train.steps=12",
    "train.batch_size=4",
    "train.log_every=5",
    "train.checkpoint_every=5",
    "train.eval_tokens=400",
    "train.final_eval_tokens=400",
    "train.tensorboard=false",
    "optim.warmup_steps=4",
)


def needle_run(root: Path, *more: str) -> RunConfig:
    """The preset needle made small: 6 steps of short sequences, 6 of long ones."""
    if not (root / "text").exists():
        write_corpus(root / "text")
    places = (f'data.folder="{root / "text"}"', f'data.cache="{root / "cache"}"')
    return load_settings("needle", None, [*SMALL, *places, *more])


def windows(config: RunConfig) -> Windows:
    text = np.frombuffer(("the expert router sends every token to two of many " * 99).encode(), np.uint8)
    return Windows(text, config.data.sequence_length)


def trainer_of(root: Path, *more: str) -> Trainer:
    config = needle_run(root, *more)
    return Trainer(config, windows(config))


@pytest.mark.parametrize("step", [0, 11], ids=["short sequences", "long sequences"])
def test_the_loss_is_that_of_answers_of_text_and_of_where_attention_looks(tmp_path, step):
    trainer = trainer_of(tmp_path, "needle.text_loss=0.3", "needle.pointer_loss=0.7")
    trainer.model.double()
    ids, places, targets, is_answer, pointers = trainer.task.batch(step)[:5]
    loss = trainer.task.loss(trainer.model, *trainer.task.batch(step))
    whole = trainer.model.hidden(ids)
    logits = trainer.model.logits(whole.states)
    answers, others, looked = [], [], []
    for row in range(len(ids)):
        for place, target, answer, pointer in zip(
            places[row].tolist(), targets[row], is_answer[row], pointers[row].tolist(), strict=True
        ):
            (answers if answer else others).append(F.cross_entropy(logits[row, place], target))
            for head in range(2 if pointer >= 0 else 0):
                seen = whole.attended.keys[row, 0, : place + 1] @ whole.attended.queries[row, head, place]
                looked.append(-seen.log_softmax(0)[pointer])
    answer, other, look = (torch.stack(terms).mean() for terms in (answers, others, looked))
    torch.testing.assert_close(loss.cross_entropy, answer, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.total, answer + 0.3 * other + 0.7 * look, rtol=1e-9, atol=1e-9)


def gradients(trainer: Trainer, step: int) -> dict[str, Tensor]:
    """Of the batch of a step, as the optimizer sees them."""
    trainer.progress.step = step
    seen: dict[str, Tensor] = {}

    def look() -> None:
        seen.update(
            {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        )

    trainer.optimizer.step = look
    trainer.step()
    return seen


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("step", [0, 11], ids=["short sequences", "long sequences"])
def test_parts_of_a_batch_add_up_to_the_gradients_of_the_whole(tmp_path, step, accumulation):
    options = ("optim.clip=0.0", "needle.text_share=0.02")
    one = trainer_of(tmp_path, *options)
    parts = trainer_of(tmp_path, *options, f"train.accumulation={accumulation}")
    counts = one.task.batch(step)[3].sum(1)
    assert len(set(counts.tolist())) > 1  # or else means of means would do
    whole, summed = gradients(one, step), gradients(parts, step)
    assert whole.keys() == summed.keys() == dict(one.model.named_parameters()).keys()
    for name, gradient in whole.items():
        scale = gradient.abs().max().item()
        error = (summed[name] - gradient).abs().max().item()
        assert error <= 1e-4 * scale, name
    ours, theirs = parts.meter.read(), one.meter.read()
    for key in ("loss", "cross_entropy"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


@pytest.mark.parametrize(
    ("length", "batch", "accumulation"), [(200, 4, 4), (200, 4, 2), (150, 3, 3), (800, 2, 2)]
)
def test_every_step_has_as_many_sequences_as_its_parts_can_share(tmp_path, length, batch, accumulation):
    shape = (f"data.sequence_length={length}", f"train.batch_size={batch}")
    trainer = trainer_of(tmp_path, *shape, f"train.accumulation={accumulation}")
    for step in (0, 11):
        for tensor in trainer.task.batch(step):
            assert len(tensor) % accumulation == 0 and len(tensor) >= batch


@pytest.mark.parametrize(("step", "accumulation"), [(5, 2), (10, 1)])  # before and after sequences get long
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, step, accumulation):
    config = needle_run(tmp_path, JITTER, f"train.accumulation={accumulation}")
    train(config, tmp_path / "straight")
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped", log=stop_at(step))
    torch.manual_seed(99)
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("step", [0, 11], ids=["short sequences", "long sequences"])
def test_a_sequence_of_text_alone_has_the_loss_of_text_alone(tmp_path, step):
    trainer = trainer_of(tmp_path, "needle.text_sequences=1.0", "needle.text_loss=0.3")
    trainer.model.double()
    batch = trainer.task.batch(step)
    ids, places, targets, is_answer, pointers = batch[:5]
    assert not is_answer.any() and (pointers == -1).all() and (places[:, 1:] > places[:, :-1]).all()
    assert torch.equal(ids.gather(1, places[:, :-1] + 1), targets[:, :-1])
    loss = trainer.task.loss(trainer.model, *batch)
    logits = trainer.model.logits(trainer.model.hidden(ids, at=places).states)
    expected = 0.3 * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss.total, expected)
    assert loss.cross_entropy == 0


def test_passages_come_from_all_over_the_text():
    """Of a text whose every byte says where it stands."""
    text = (np.arange(256 * 1000) // 1000).astype(np.uint8)
    config = NeedleConfig(text_sequences=1.0)
    batch = training_batch(text, config, length=3000, batch=20, seed=0, step=0)
    steps = batch.ids.diff(dim=1)
    jumps = ((steps != 0) & (steps != 1)).sum(1)
    assert jumps.min() >= 0 and 1 < jumps.double().mean() < 10
    assert len(batch.ids.unique()) > 80


def test_a_share_of_the_sequences_is_text_alone():
    text = np.frombuffer(b"the expert router sends every token to two of many " * 99, np.uint8)
    config = NeedleConfig(text_sequences=0.2)
    batch = training_batch(text, config, length=512, batch=200, seed=0, step=0)
    assert 20 <= (~batch.is_answer.any(1)).sum() <= 62


def test_a_small_run_learns_to_answer(tmp_path):
    config = needle_run(tmp_path, "train.steps=60", "optim.lr=0.01", "train.batch_size=2")
    train(config, tmp_path / "run")
    losses = [r["cross_entropy"] for r in log_of(tmp_path / "run") if r["kind"] == "train"]
    assert losses[-1] < np.log(10) + 0.3 < losses[0]  # at least, that answers are digits


def test_the_settings_of_a_run_are_written_and_read_with_and_without_needles(tmp_path):
    with_needles, without = needle_run(tmp_path), tiny_run(tmp_path)
    for config in (with_needles, without):
        assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "needle" not in without.to_dict() and without.needle is None
    assert RunConfig.from_dict(without.to_dict() | {"needle": None}) == without
    train(with_needles, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "run_config.json").read_text())
    assert RunConfig.from_dict(stored) == with_needles
    only_needle = differences(with_needles, RunConfig.from_dict(with_needles.to_dict() | {"needle": None}))
    assert {key.partition(".")[0] for key in only_needle} == {"needle"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("needle.pointer_los=1.0", "needle has no key 'pointer_los'. Did you mean 'pointer_loss'?"),
        ("needles.pointer_loss=1.0", "no part 'needles'. Did you mean 'needle'?"),
        ("needle.text_loss=-1.0", "needle.text_loss=-1.0 is the weight of a loss"),
        ("needle.short_length=8", "needle.short_length=8 must be at least"),
        ("data.sequence_length=20", "data.sequence_length=20 must be at least"),
        ("needle.templates=['rhyme']", "needle.templates has no 'rhyme'"),
        ("needle.templates=[]", "needle.templates is empty"),
        ("needle=3", "'needle' is a table"),
    ],
)
def test_a_wrong_setting_of_needles_is_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("[", r"\[")):
        needle_run(tmp_path, override)


def test_an_unknown_key_in_a_file_of_settings_is_refused_with_the_nearest_one(tmp_path):
    values = needle_run(tmp_path).to_dict()
    values["needle"]["text_shares"] = 0.5
    with pytest.raises(ValueError, match=r"no key 'text_shares'\. Did you mean 'text_share'"):
        RunConfig.from_dict(values)


def test_a_preset_without_needles_is_given_some_by_one_key(tmp_path):
    more = ("needle.pointer_loss=0.25", "data.sequence_length=256")
    assert tiny_run(tmp_path, *more).needle == NeedleConfig(pointer_loss=0.25)
    with pytest.raises(ValueError, match=r"data.sequence_length=32 must be at least \d+: a needle"):
        tiny_run(tmp_path, "needle.pointer_loss=0.25")


def test_other_needles_are_refused_when_a_run_is_resumed(tmp_path):
    config = needle_run(tmp_path)
    train(config, tmp_path / "run")
    other = change(config, None, ["needle.pointer_loss=0.0", "train.steps=14"])
    with pytest.raises(ValueError, match=r"needle\.pointer_loss: 0\.5 -> 0\.0"):
        train(other, tmp_path / "run", resume=True)


def test_what_is_predicted_is_the_next_byte(tmp_path):
    ids, places, targets, is_answer, pointers = trainer_of(tmp_path).task.batch(3)[:5]
    rows = torch.arange(len(ids))[:, None]
    known = places + 1 < ids.shape[1]
    assert torch.equal(ids[rows, (places + 1).clamp(max=ids.shape[1] - 1)][known], targets[known])
    assert torch.equal(ids[rows, pointers.clamp(min=0)][is_answer], targets[is_answer])
    assert (targets.where(is_answer, IGNORED) != IGNORED).any(1).all()
