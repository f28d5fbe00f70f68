"""What a run trains on: the batch of each step and its loss."""

from typing import Protocol

from torch import Tensor

from moe.decoder import Decoder, DecoderLoss
from moe.train.data import Windows, train_batch
from moe.train.settings import RunConfig


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


def make_task(config: RunConfig, windows: Windows) -> Task:
    """The task of a run: that of its part `senses` or `needle`, else the next token."""
    if config.senses is not None:
        from moe.probes.senses.task import FindSenses  # probes know training; training does not know them

        return FindSenses(config, windows)
    if config.needle is not None:
        from moe.probes.needle.task import FindNeedles

        return FindNeedles(config, windows)
    return NextToken(config, windows)
