"""A run with several tasks: the preset omni made small, its steps, its gradients, a run that is resumed."""

import json

import numpy as np
import pytest
import torch
from senses_helpers import SMALL, handwriting, places
from test_resume import Killed, assert_same_run, log_of, stop_at

from moe.probes.language.task import LearnLanguages
from moe.probes.needle.task import FindNeedles
from moe.probes.senses.task import FindSenses
from moe.train.data import Windows
from moe.train.loop import train
from moe.train.overrides import load_settings
from moe.train.settings import RunConfig
from moe.train.task import Mixture, make_task
from moe.train.trainer import Trainer

__all__ = ["handwriting"]  # a fixture that every test here uses


def omni_run(root, *more: str) -> RunConfig:
    return load_settings("omni", None, [*SMALL, *places(root), "language.most_sentences=3", *more])


def windows(config: RunConfig) -> Windows:
    text = np.frombuffer(("the expert router sends every token to two of many " * 99).encode(), np.uint8)
    return Windows(text, config.data.sequence_length)


def test_the_preset_omni_has_both_tasks_in_equal_parts(tmp_path):
    config = omni_run(tmp_path)
    task = make_task(config, windows(config))
    assert isinstance(task, Mixture) and [type(one) for one in task.tasks] == [FindSenses, LearnLanguages]
    assert np.bincount([task.number(step) for step in range(100)]).tolist() in ([50, 50], [51, 49])


def test_shares_of_three_tasks_are_those_of_their_parts(tmp_path):
    shares = ("needle.share=2.0", "senses.share=1.0", "language.share=1.0")
    config = omni_run(tmp_path, *shares, "needle.short_length=140")
    task = make_task(config, windows(config))
    assert isinstance(task, Mixture)
    assert [type(one) for one in task.tasks] == [FindNeedles, FindSenses, LearnLanguages]
    turns = np.bincount([task.number(step) for step in range(400)])
    assert np.abs(turns - [200, 100, 100]).max() <= 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_step_is_the_loss_of_one_task(tmp_path, accumulation):
    """Its parts add up to the gradients of the whole, and only senses reach the embedders of images."""
    config = omni_run(tmp_path, f"train.accumulation={accumulation}")
    trainer = Trainer(config, windows(config))
    model, task = trainer.model.double(), trainer.task
    assert isinstance(task, Mixture)
    for step in range(4):
        batch, own = task.batch(step), task.tasks[task.number(step)]
        model.zero_grad()
        loss = task.loss(model, *batch)
        torch.testing.assert_close(loss.total, own.loss(model, *own.batch(step)).total)
        loss.total.backward()
        seen = model.model.embed_modalities.image_proj.weight.grad
        assert (seen is not None and bool(seen.any())) == isinstance(own, FindSenses)
        whole = model.lm_head.weight.grad.clone()
        model.zero_grad()
        for part in zip(*(tensor.chunk(accumulation) for tensor in batch), strict=True):
            (task.loss(model, *part).total / accumulation).backward()
        torch.testing.assert_close(model.lm_head.weight.grad, whole)


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    config = omni_run(tmp_path, "train.steps=10")
    train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, tmp_path / "halves", log=stop_at(7))
    train(config, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert log_of(tmp_path / "whole")


def test_the_settings_of_several_tasks_are_written_and_read(tmp_path):
    config = omni_run(tmp_path)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("share", ["0.0", "-1.0", "inf"])
def test_a_share_is_above_0(tmp_path, share):
    with pytest.raises(ValueError, match="share"):
        omni_run(tmp_path, f"language.share={share}")
