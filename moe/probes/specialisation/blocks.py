"""Blocks: what permutations keep together. Axes: n blocks, l MoE layers; the others as in `moe`."""

import torch
from einops import rearrange, repeat
from torch import Tensor


class BlockCounts:
    """Slots of every block: slots (n l e) and labels (n), int64."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.slots = torch.zeros(0, 0, 0, dtype=torch.int64)
        self.labels = torch.zeros(0, dtype=torch.int64)
        self._row_of_document: dict[int, int] = {}

    def new_rows(self, runs: Tensor, labels: Tensor) -> Tensor:
        """A new row for each different number of `runs` (t): the rows (t)."""
        _, rows = runs.unique(return_inverse=True)
        return self._append(rows, labels)

    def rows_of(self, documents: Tensor, labels: Tensor) -> Tensor:
        """The rows of documents (t), new ones for those not seen before.

        Raises:
            ValueError: a document with two labels.
        """
        names, which = documents.unique(return_inverse=True)
        first = torch.zeros(len(names), dtype=torch.int64).scatter_(0, which, labels)
        known = torch.tensor([self._row_of_document.get(name, -1) for name in names.tolist()]).long()
        before = (
            torch.where(known >= 0, self.labels[known.clamp(min=0)], first) if len(self.labels) else first
        )
        if len(clash := (before[which] != labels).nonzero()):
            at = int(clash[0])
            raise ValueError(
                f"document {int(documents[at])} has labels {int(before[which[at]])} and {int(labels[at])}: "
                f"a block has one. Give each part a number of its own."
            )
        is_new = known < 0
        rows = known.clone()
        rows[is_new] = torch.arange(int(is_new.sum())) + len(self.labels)
        self.labels = torch.cat([self.labels, first[is_new]])
        self._row_of_document.update(zip(names.tolist(), rows.tolist(), strict=True))
        return rows[which]

    def add(self, rows: Tensor, experts: Tensor, num_experts: int) -> None:
        """Count experts (t l k) of tokens in blocks `rows` (t); then join blocks while there are too many."""
        t, layers, top_k = experts.shape
        grown = torch.zeros(len(self.labels), layers, num_experts + 1, dtype=torch.int64)
        old = self.slots if self.slots.shape[1] else self.slots.new_zeros(0, layers, num_experts)
        grown[: len(old), :, :num_experts] = old
        places = repeat(rows * layers, "t -> t l k", l=layers, k=top_k)
        places = (places + torch.arange(layers)[:, None]) * (num_experts + 1) + experts
        grown.view(-1).index_add_(0, places.flatten(), torch.ones(t * layers * top_k, dtype=torch.int64))
        self.slots = grown[..., :num_experts]
        while len(self.labels) > self.max_blocks:
            self._join()

    def _append(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Rows (t) counted from 0, with the labels of their tokens, as rows at the end."""
        added = int(rows.max()) + 1 if len(rows) else 0
        rows = rows + len(self.labels)
        self.labels = torch.cat([self.labels, self.labels.new_zeros(added)]).scatter_(0, rows, labels)
        return rows

    def _join(self) -> None:
        """Blocks of the same label become one, two by two, in the order in which they came."""
        order = torch.argsort(self.labels, stable=True)
        sizes = torch.bincount(self.labels)
        rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[self.labels[order]]
        halves = (sizes + 1) // 2
        joined = torch.empty_like(order)
        joined[order] = (halves.cumsum(0) - halves)[self.labels[order]] + rank // 2
        count = int(halves.sum())
        self.slots = self.slots.new_zeros(count, *self.slots.shape[1:]).index_add_(0, joined, self.slots)
        self.labels = self.labels.new_zeros(count).scatter_(0, joined, self.labels)
        self._row_of_document = {name: int(joined[row]) for name, row in self._row_of_document.items()}


def runs(labels: Tensor, counted: Tensor) -> Tensor:
    """Number of the run of every token (b s): it grows where the label changes, and at each sequence.

    Tokens that are not `counted` end a run.
    """
    begins = torch.ones_like(counted)
    begins[:, 1:] = (labels[:, 1:] != labels[:, :-1]) | (counted[:, 1:] != counted[:, :-1])
    return rearrange(rearrange(begins, "b s -> (b s)").cumsum(0), "(b s) -> b s", b=len(labels))
