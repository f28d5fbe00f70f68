"""Training a decoder to find needles: dense sequences, the loss of answers, and where it should look."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.cross_entropy import IGNORED
from moe.decoder import Decoder
from moe.decoder_loss import DecoderLoss
from moe.losses import pointer_loss
from moe.probes.needle.definitions import find_definitions
from moe.probes.needle.needles import DEFINITION
from moe.probes.needle.training import training_batch
from moe.train.corpus import find_corpus
from moe.train.data import Windows
from moe.train.settings import RunConfig
from moe.train.task import share_of


class FindNeedles:
    """Cross-entropy of answers + text_loss * that of some other bytes + pointer_loss * attention's own.

    Only places that are predicted go through the last layer's queries, its feed-forward and the head.
    """

    def __init__(self, config: RunConfig, windows: Windows) -> None:
        assert config.needle is not None, "only a run with a part `needle` trains on needles"
        self.config, self.needle = config, config.needle
        self.text = cast("NDArray[np.uint8]", windows.tokens)  # bytes are the only tokens of needles
        self.definitions = None
        if DEFINITION.name in config.needle.templates:
            corpus = find_corpus(config.data)
            self.definitions = find_definitions(corpus.train, corpus.root)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The tensors of a `TrainingBatch`, and totals (b 2) int64, the same in each row: the answers and the
        sequences of all parts, without which the means of unlike parts would not add up to that of the whole.
        """
        train, data = self.config.train, self.config.data
        length, batch = self.needle.shape(
            step, train.steps, length=data.sequence_length, batch=train.batch_size
        )
        batch -= batch % train.accumulation  # never below batch_size, which its parts share
        made = training_batch(
            self.text,
            self.needle,
            length=length,
            batch=batch,
            seed=train.seed,
            step=step,
            definitions=self.definitions,
        )
        totals = torch.tensor([[int(made.is_answer.sum()), batch]] * batch)
        return made.ids, made.places, made.targets, made.is_answer, made.pointers, totals

    def loss(self, model: Decoder, *batch: Tensor) -> DecoderLoss:
        """`cross_entropy` is that of the answers alone; `total` has all three parts."""
        ids, places, targets, is_answer, pointers, totals = batch
        hidden = model.hidden(ids, at=places)
        answers, others = (
            model.cross_entropy(hidden.states, targets.where(chosen, IGNORED))
            for chosen in (is_answer, ~is_answer)
        )
        all_answers, sequences = totals[0]
        of_answers = share_of(is_answer, all_answers, sequences)
        of_others = share_of(~is_answer, sequences * is_answer.shape[1] - all_answers, sequences)
        answers, others = answers * of_answers, others * of_others
        total = answers + self.needle.text_loss * others
        if self.needle.pointer_loss:
            looked = hidden.attended
            found = pointer_loss(looked.queries, looked.keys, places, pointers) * of_answers
            total = total + self.needle.pointer_loss * found
        return model.with_router_losses(answers, total, hidden, len(ids))
