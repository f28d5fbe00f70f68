"""Counts of who went where, accumulated over forward passes: by layer, label and expert.

A *slot* is one choice of one token. A *block* is what permutations keep together: a document, or a run, the
longest stretch of one label in one sequence. Memory grows with blocks and with distinct sets of experts up to
a limit, never with tokens.

Axes: n blocks, l MoE layers, y labels, m sets; the others as in `moe`.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from moe.probes.specialisation.blocks import BlockCounts, runs
from moe.probes.specialisation.token_ids import TokenIdCounts
from moe.routing import Routing

NOT_COUNTED = -1  # the label of a token that is left out
MAX_BLOCKS = 2**14
MAX_SETS = 2**16


class RoutingCounts:
    """Slots by block, layer and expert, and tokens by set of experts, of all that was added.

    labels      their names; a token has the number of one
    max_blocks  beyond, blocks of the same label are joined two by two: permutations get coarser, no count
                is lost
    vocab_size  v, if tokens are to be counted by their ids as well
    """

    def __init__(
        self, labels: Sequence[str], *, max_blocks: int = MAX_BLOCKS, vocab_size: int | None = None
    ) -> None:
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"labels={list(labels)} must be names, at least one and each once.")
        if max_blocks < 2 * len(labels):
            raise ValueError(
                f"max_blocks={max_blocks} must be at least {2 * len(labels)}, two for each label."
            )
        self.labels = tuple(labels)
        self.tokens = torch.zeros(len(labels), dtype=torch.int64)  # (y)
        self.blocks = BlockCounts(max_blocks)
        self.sets: list[SetCounts] = []  # of each layer
        self.ids: TokenIdCounts | None = None  # made by the first `add`, where there is a vocab_size
        self.vocab_size = vocab_size
        self.num_experts = self.top_k = 0

    def add(
        self,
        routings: Sequence[Routing],
        labels: Tensor,
        *,
        documents: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> None:
        """Count the routings of one forward pass, one for each MoE layer.

        labels     (b s) int64, or (b) for whole sequences; -1 leaves a token out, and so does padding
        documents  (b s) or (b) int64: the blocks, which may go on in later passes; None: runs of a label
        ids        (b s) int64 of the tokens, if there is a vocab_size

        Pairs with the id e were dropped: they are counted as such. Capacity drops later, in the plan, and
        does not show here.

        Raises:
            ValueError: no routing, another number of layers, experts or tokens than expected, a label without
                a name, ids without a vocab_size or the reverse, or a document with two labels.
        """
        experts = self._check_routings(routings)  # (t l k)
        labels = _per_token(labels, "labels", len(experts))
        self._check_labels(labels)
        counted = labels != NOT_COUNTED
        if (mask := routings[0].mask) is not None:
            counted &= rearrange(mask.cpu(), "(b s) -> b s", b=len(labels))
        ids = self._check_ids(ids, labels)
        if documents is None:
            rows = self.blocks.new_rows(runs(labels, counted)[counted], labels[counted])
        else:
            documents = _per_token(documents, "documents", len(experts), sequences=len(labels))
            rows = self.blocks.rows_of(documents[counted], labels[counted])
        experts, labels = experts[rearrange(counted, "b s -> (b s)")], labels[counted]
        self.tokens += torch.bincount(labels, minlength=len(self.labels))
        self.blocks.add(rows, experts, self.num_experts)
        for layer, sets in enumerate(self.sets):
            sets.add(experts[:, layer], labels)
        if self.ids is not None:
            self.ids.add(ids[counted], labels, experts)

    @property
    def slots(self) -> Tensor:
        """(l y e), without dropped pairs."""
        table = torch.zeros(len(self.labels), len(self.sets), self.num_experts, dtype=torch.int64)
        if self.sets:
            table.index_add_(0, self.blocks.labels, self.blocks.slots)
        return rearrange(table, "y l e -> l y e")

    @property
    def dropped(self) -> Tensor:
        """Pairs of counted tokens that went to no expert (l)."""
        return int(self.tokens.sum()) * self.top_k - reduce(self.slots, "l y e -> l", "sum")

    def _check_routings(self, routings: Sequence[Routing]) -> Tensor:
        if not routings:
            raise ValueError("there is no routing to count: the model has no MoE layer. Ask one that has.")
        shapes = {(*one.experts.shape, one.num_experts) for one in routings}
        if len(shapes) > 1:
            raise ValueError(
                f"(tokens, top_k, experts) differ between layers: {sorted(shapes)}. Count them apart."
            )
        ((_, top_k, num_experts),) = shapes
        if not self.sets:
            self.num_experts, self.top_k = num_experts, top_k
            self.sets = [SetCounts(len(self.labels), top_k) for _ in routings]
            if self.vocab_size is not None:
                sizes = (len(self.labels), self.vocab_size, len(routings), num_experts)
                self.ids = TokenIdCounts(*sizes)
        new, old = (len(routings), top_k, num_experts), (len(self.sets), self.top_k, self.num_experts)
        if new != old:
            raise ValueError(
                f"(layers, top_k, experts) are {new}, and were {old}: count one model at a time."
            )
        return torch.stack([one.experts for one in routings], dim=1).cpu()

    def _check_ids(self, ids: Tensor | None, labels: Tensor) -> Tensor:
        if (ids is None) != (self.vocab_size is None):
            given = "missing" if ids is None else "given"
            raise ValueError(f"ids are {given} with vocab_size={self.vocab_size}. Give both or none.")
        if ids is None or self.vocab_size is None:
            return labels  # not looked at
        if ids.shape != labels.shape or ids.dtype != torch.int64:
            raise ValueError(
                f"ids must be int64 {tuple(labels.shape)}, got {tuple(ids.shape)} of {ids.dtype}."
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(
                f"ids go from {int(ids.min())} to {int(ids.max())}; vocab_size={self.vocab_size} has "
                f"0 to {self.vocab_size - 1}."
            )
        return ids.cpu()

    def _check_labels(self, labels: Tensor) -> None:
        wrong = labels[(labels < NOT_COUNTED) | (labels >= len(self.labels))]
        if len(wrong):
            raise ValueError(
                f"label {int(wrong[0])} has no name: labels go from 0 to {len(self.labels) - 1}, "
                f"and {NOT_COUNTED} leaves a token out."
            )


class SetCounts:
    """How many tokens of each label chose each set of experts: sets (m k), sorted, and tokens (m y), int64.

    `is_complete` is False once there were more than `max_sets`: then nothing is kept.
    """

    def __init__(self, num_labels: int, top_k: int, *, max_sets: int = MAX_SETS) -> None:
        self.max_sets = max_sets
        self.is_complete = True
        self.sets = torch.zeros(0, top_k, dtype=torch.int64)
        self.tokens = torch.zeros(0, num_labels, dtype=torch.int64)

    def add(self, experts: Tensor, labels: Tensor) -> None:
        """Count tokens with experts (t k) and labels (t)."""
        if not self.is_complete:
            return
        one_of_each = torch.zeros(len(experts), self.tokens.shape[1], dtype=torch.int64)
        one_of_each.scatter_(1, labels[:, None], 1)
        sets = torch.cat([self.sets, experts.sort(dim=1).values])
        tokens = torch.cat([self.tokens, one_of_each])
        if len(sets):
            self.sets, which = sets.unique(dim=0, return_inverse=True)
            self.tokens = tokens.new_zeros(len(self.sets), tokens.shape[1]).index_add_(0, which, tokens)
        if len(self.sets) > self.max_sets:
            self.is_complete = False
            self.sets, self.tokens = self.sets[:0], self.tokens[:0]


def _per_token(values: Tensor, what: str, tokens: int, *, sequences: int | None = None) -> Tensor:
    """(b s) or (b) as (b s), on the CPU."""
    if values.dtype != torch.int64 or values.dim() not in (1, 2) or not len(values):
        raise ValueError(
            f"{what} must be int64, (b s) or (b), of at least one sequence; "
            f"got {tuple(values.shape)} of {values.dtype}."
        )
    b = len(values)
    if tokens % b or (values.dim() == 2 and values.numel() != tokens) or sequences not in (None, b):
        raise ValueError(f"{what} {tuple(values.shape)} do not fit {tokens} tokens: give one for each.")
    values = values.cpu()
    return repeat(values, "b -> b s", s=tokens // b) if values.dim() == 1 else values
