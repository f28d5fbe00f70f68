"""Training a decoder to find and to read needles of every sense."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.cross_entropy import IGNORED
from moe.decoder import Decoder
from moe.decoder_loss import DecoderLoss
from moe.losses import pointer_loss
from moe.probes.senses.bank import build_bank
from moe.probes.senses.training import ANSWER, READING, TEXT, senses_batch
from moe.train.data import Windows
from moe.train.settings import RunConfig
from moe.train.task import share_of

KINDS = (ANSWER, TEXT, READING)


class FindSenses:
    """Cross-entropy of answers + text_loss * that of other text + reading_loss * that of digits where they
    stand + pointer_loss * attention's own.

    Only places where something is predicted go through the last layer's queries, feed-forward and head.
    """

    def __init__(self, config: RunConfig, windows: Windows) -> None:
        assert config.senses is not None, "only a run with a part `senses` trains on its needles"
        assert config.model.modalities is not None, "the run's configuration has checked that"
        self.config, self.senses = config, config.senses
        self.text = cast("NDArray[np.uint8]", windows.tokens)  # bytes are the only text of needles
        self.bank = build_bank(config.senses, config.model.modalities, "train", seed=config.train.seed)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The tensors of a `SensesBatch`, and totals (b 4) int64, the same in each row: the places of each
        kind and the sequences of all parts, without which means of unlike parts would not add up to that of
        the whole.
        """
        train, data = self.config.train, self.config.data
        length, batch = self.senses.shape(
            step, train.steps, length=data.sequence_length, batch=train.batch_size
        )
        batch -= batch % train.accumulation  # never below batch_size, which its parts share
        made = senses_batch(
            self.text, self.bank, self.senses, length=length, batch=batch, seed=train.seed, step=step
        )
        counts = [int((made.kinds == kind).sum()) for kind in KINDS]
        return (
            made.ids,
            made.modality,
            made.features,
            made.places,
            made.targets,
            made.kinds,
            made.pointers,
            made.widths,
            torch.tensor([[*counts, batch]] * batch),
        )

    def loss(self, model: Decoder, *batch: Tensor) -> DecoderLoss:
        """`cross_entropy` is that of the answers alone; `total` has all parts."""
        ids, modality, features, places, targets, kinds, pointers, widths, totals = batch
        hidden = model.hidden(inputs_embeds=model.embed(ids, modality, features), at=places)
        answers, text, reading = (
            model.cross_entropy(hidden.states, targets.where(kinds == kind, IGNORED))
            * share_of(kinds == kind, totals[0, kind], totals[0, -1])
            for kind in KINDS
        )
        total = answers + self.senses.text_loss * text + self.senses.reading_loss * reading
        if self.senses.pointer_loss:
            looked = hidden.attended
            found = pointer_loss(looked.queries, looked.keys, places, pointers, widths)
            of_answers = share_of(kinds == ANSWER, totals[0, ANSWER], totals[0, -1])
            total = total + self.senses.pointer_loss * found * of_answers
        return model.with_router_losses(answers, total, hidden, len(ids))
