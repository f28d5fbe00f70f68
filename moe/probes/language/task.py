"""Training a decoder to translate into languages that it meets in its context alone."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.cross_entropy import IGNORED
from moe.decoder import Decoder
from moe.decoder_loss import DecoderLoss
from moe.losses import pointer_loss
from moe.probes.language.training import training_batch
from moe.train.data import Windows
from moe.train.settings import RunConfig
from moe.train.task import share_of


class LearnLanguages:
    """Cross-entropy of the translations, and of nothing else."""

    def __init__(self, config: RunConfig, windows: Windows) -> None:
        assert config.language is not None, "only a run with a part `language` trains on languages"
        self.config, self.language = config, config.language
        self.text = cast("NDArray[np.uint8]", windows.tokens)  # bytes are the only tokens of languages

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The tensors of a `TrainingBatch`, and totals (b 3) int64, the same in each row: predicted bytes,
        pointers and documents of all parts, without which means of unlike parts would not add up.
        """
        train = self.config.train
        made = training_batch(
            self.text,
            self.language,
            budget=self.config.data.sequence_length * train.batch_size,
            multiple=train.accumulation,
            seed=train.seed,
            step=step,
            steps=train.steps,
        )
        count = len(made.ids)
        totals = torch.tensor([[int(made.is_answer.sum()), int((made.pointers >= 0).sum()), count]] * count)
        return made.ids, made.places, made.targets, made.is_answer, made.pointers, totals

    def loss(self, model: Decoder, *batch: Tensor) -> DecoderLoss:
        """`cross_entropy` is that of the translations."""
        ids, places, targets, is_answer, pointers, totals = batch
        hidden = model.hidden(ids, at=places)
        answers = model.cross_entropy(hidden.states, targets.where(is_answer, IGNORED))
        answers = answers * share_of(is_answer, totals[0, 0], totals[0, 2])
        total = answers
        if self.language.pointer_loss:
            looked = hidden.attended
            found = pointer_loss(looked.queries, looked.keys, places, pointers)
            found = found * share_of(pointers >= 0, totals[0, 1], totals[0, 2])
            total = total + self.language.pointer_loss * found
        return model.with_router_losses(answers, total, hidden, len(ids))
