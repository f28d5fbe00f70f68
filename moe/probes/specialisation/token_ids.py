"""What token ids explain: labels differ in the tokens they are made of, and a router may see nothing else.

Axes: l MoE layers, y labels; the others as in `moe`.
"""

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor

from moe.probes.specialisation.information import mutual_information

MOST_COUNTS = 2**24  # l * v * e


class TokenIdCounts:
    """Tokens by label and id, and slots by layer, id and expert.

    `is_complete` is False where l * v * e is over `MOST_COUNTS`: then nothing is kept.

    tokens  (y v) int64
    slots   (l v e) int64
    """

    def __init__(self, num_labels: int, vocab_size: int, num_layers: int, num_experts: int) -> None:
        self.is_complete = num_layers * vocab_size * num_experts <= MOST_COUNTS
        kept = vocab_size if self.is_complete else 0
        self.tokens = torch.zeros(num_labels, kept, dtype=torch.int64)
        self.slots = torch.zeros(num_layers, kept, num_experts, dtype=torch.int64)

    def add(self, ids: Tensor, labels: Tensor, experts: Tensor) -> None:
        """Count tokens with ids (t), labels (t) and experts (t l k); the expert id e marks dropped pairs."""
        if not self.is_complete:
            return
        layers, vocab, num_experts = self.slots.shape
        self.tokens.view(-1).index_add_(0, labels * vocab + ids, torch.ones_like(ids))
        places = torch.arange(layers)[:, None] * vocab + rearrange(ids, "t -> t 1 1")
        places = places * (num_experts + 1) + experts
        counted = torch.bincount(places.flatten(), minlength=layers * vocab * (num_experts + 1))
        self.slots += rearrange(counted, "(l v e) -> l v e", l=layers, v=vocab)[..., :num_experts]

    def explained(self, layer: int) -> float:
        """Bits that experts would tell of the label, did each id go to its experts alike under every label.

        From the labels' own frequencies of ids, and the experts of each id under all labels together. Ids
        that a single label has are explained by themselves: for large vocabularies this is too high.
        """
        slots = self.slots[layer].double()  # (v e)
        shares = slots / self.tokens.sum(0).clamp(min=1)[:, None]
        expected = einsum(self.tokens.double(), shares, "y v, v e -> y e")
        return float(mutual_information(np.asarray(expected)))
