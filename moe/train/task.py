"""What a run trains on: the batch of each step and its loss."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moe.decoder import Decoder
from moe.decoder_loss import DecoderLoss
from moe.train.data import Windows, train_batch
from moe.train.settings import TASKS, RunConfig

GOLDEN = (5**0.5 - 1) / 2


class Task(Protocol):
    """A source of batches, each a pure function of the step, and their loss."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The tensors of a step, counted from 0; the first axis of each is the sequences."""
        ...

    def loss(self, model: Decoder, *batch: Tensor) -> DecoderLoss:
        """The loss of a batch, or of some of its sequences."""
        ...


class NextToken:
    """Every token of a text from those before it."""

    def __init__(self, config: RunConfig, windows: Windows) -> None:
        self.config, self.windows = config, windows

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """ids and targets, (b s) each."""
        train = self.config.train
        return train_batch(self.windows, train.batch_size, seed=train.seed, step=step)

    def loss(self, model: Decoder, *batch: Tensor) -> DecoderLoss:
        """As `Decoder.loss`."""
        ids, targets = batch
        return model.loss(ids, targets)


class Mixture:
    """Several tasks in one run: each step is of one of them, as often as its share says, in an even order."""

    def __init__(self, tasks: Sequence[Task], shares: Sequence[float]) -> None:
        """shares: relative, above 0, one for each task."""
        self.tasks = tuple(tasks)
        self.limits = np.cumsum(shares)[:-1] / np.sum(shares)

    def number(self, step: int) -> int:
        """Which task a step is of. Multiples of the golden ratio fill the shares evenly from any step on."""
        return int(np.searchsorted(self.limits, step * GOLDEN % 1.0, side="right"))

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The number of the task in each row, (b), and its batch."""
        number = self.number(step)
        batch = self.tasks[number].batch(step)
        return torch.full((len(batch[0]),), number), *batch

    def loss(self, model: Decoder, *batch: Tensor) -> DecoderLoss:
        """The loss of the task that made the batch."""
        numbers, *rest = batch
        return self.tasks[int(numbers[0])].loss(model, *rest)


def share_of(part: Tensor, whole: Tensor, sequences: Tensor) -> Tensor:
    """The places chosen (b m) in these sequences over those that as many have, on average, in the batch.

    `whole` places are chosen in the batch of `sequences`; 1 where these are all of it. With it, means of
    unlike parts of an accumulated batch add up to that of the whole.
    """
    return sequences * part.sum() / (len(part) * whole.clamp(min=1))


def make_task(config: RunConfig, windows: Windows) -> Task:
    """The task of a run: that of its part `needle`, `senses` or `language`, of several a mixture by their
    `share`; without one the next token.
    """
    parts = [part for part in TASKS if getattr(config, part) is not None]
    tasks = [_task(part, config, windows) for part in parts]
    if len(tasks) > 1:
        return Mixture(tasks, [getattr(config, part).share for part in parts])
    return tasks[0] if tasks else NextToken(config, windows)


def _task(part: str, config: RunConfig, windows: Windows) -> Task:
    # imported late: probes know training; training does not know them
    if part == "needle":
        from moe.probes.needle.task import FindNeedles

        return FindNeedles(config, windows)
    if part == "senses":
        from moe.probes.senses.task import FindSenses

        return FindSenses(config, windows)
    from moe.probes.language.task import LearnLanguages

    return LearnLanguages(config, windows)
