"""Training a decoder to find needles: dense sequences, the loss of answers, and where it should look."""

from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe.cross_entropy import IGNORED
from moe.decoder import Decoder, DecoderLoss
from moe.losses import pointer_loss
from moe.probes.needle.definitions import find_definitions
from moe.probes.needle.needles import DEFINITION
from moe.probes.needle.training import training_batch
from moe.train.corpus import find_corpus
from moe.train.data import Windows
from moe.train.settings import RunConfig


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
        """The tensors of a `TrainingBatch`."""
        train, data = self.config.train, self.config.data
        length, batch = self.needle.shape(
            step, train.steps, length=data.sequence_length, batch=train.batch_size
        )
        made = training_batch(
            self.text,
            self.needle,
            length=length,
            batch=batch,
            seed=train.seed,
            step=step,
            definitions=self.definitions,
        )
        return made.ids, made.places, made.targets, made.is_answer, made.pointers

    def loss(self, model: Decoder, *batch: Tensor) -> DecoderLoss:
        """`cross_entropy` is that of the answers alone; `total` has all three parts."""
        ids, places, targets, is_answer, pointers = batch
        hidden = model.hidden(ids, at=places)
        answers, others = (
            model.cross_entropy(hidden.states, targets.where(chosen, IGNORED))
            for chosen in (is_answer, ~is_answer)
        )
        total = answers + self.needle.text_loss * others
        if self.needle.pointer_loss:
            looked = hidden.attended
            found = pointer_loss(looked.queries, looked.keys, places, pointers)
            total = total + self.needle.pointer_loss * found
        return model.with_router_losses(answers, total, hidden, len(ids))
