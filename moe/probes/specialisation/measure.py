"""How much the experts that a token goes to tell of its label, layer by layer.

result = specialisation_of(decoder, batches, labels=("text", "image"))
result.layers[0].mutual_information, result.layers[0].by_block.p_value
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.decoder import Decoder
from moe.probes.specialisation.counts import RoutingCounts
from moe.probes.specialisation.information import (
    Null,
    block_null,
    entropy,
    mutual_information,
    token_null,
)

PERMUTATIONS = 999


@dataclass(frozen=True, slots=True, eq=False)
class LabelledBatch:
    """Sequences and the labels of their tokens.

    inputs     (b s) int64 ids, or (b s d) what `Decoder.embed` made of them
    labels     (b s) or (b) int64; -1 leaves a token out
    mask       (b s) bool, True at real tokens; None: all are
    documents  (b s) or (b) int64: the blocks whose labels are shuffled as wholes; None: runs of a label
    """

    inputs: Tensor
    labels: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerSpecialisation:
    """One MoE layer. Entropies and information are in bits, over the top-k slots, each counted once.

    shares      for each label the share of its slots at each expert; None for a label without slots
    load        the share of all slots at each expert
    normalised  mutual_information / label_entropy: 1 where the expert tells the label; None where there is
                one label alone
    by_ids      the part of mutual_information that the ids of the tokens explain (`TokenIdCounts.explained`);
                None where they were not counted
    dropped     pairs of counted tokens that went to no expert
    by_block    the null that whole blocks give: the one to believe
    by_token    the null that single tokens give, too easy to pass; None where there were too many different
                sets of experts to keep
    """

    layer: int
    slots: int
    dropped: int
    shares: tuple[tuple[float, ...] | None, ...]
    load: tuple[float, ...]
    mutual_information: float
    label_entropy: float
    expert_entropy: float
    normalised: float | None
    by_ids: float | None
    by_block: Null
    by_token: Null | None


@dataclass(frozen=True, slots=True)
class Specialisation:
    """All MoE layers: labels, how many tokens and blocks each of them had, and what was found."""

    labels: tuple[str, ...]
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    layers: tuple[LayerSpecialisation, ...]


def specialisation_of(
    decoder: Decoder,
    batches: Iterable[LabelledBatch],
    *,
    labels: Sequence[str],
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Specialisation:
    """Run the decoder over batches, in evaluation mode, and compare experts with labels.

    labels: the names of labels 0, 1, ... `progress` is told the tokens of each batch. Batches hold either ids
    or embeddings, not now one and now the other. Padding is not counted.
    The caller chooses the precision (`Run.autocast`).

    Raises:
        ValueError: no batch; as `RoutingCounts.add`, `specialisation` and `Decoder.hidden`.
    """
    counts: RoutingCounts | None = None
    was_training = decoder.training
    decoder.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                ids = None if batch.inputs.is_floating_point() else batch.inputs
                embeds = batch.inputs if ids is None else None
                hidden = decoder.hidden(ids, inputs_embeds=embeds, mask=batch.mask)
                if counts is None:
                    counts = RoutingCounts(
                        labels, vocab_size=None if ids is None else decoder.config.vocab_size
                    )
                counts.add(hidden.routings, batch.labels, documents=batch.documents, ids=ids)
                progress(batch.inputs.shape[0] * batch.inputs.shape[1])
    finally:
        decoder.train(was_training)
    if counts is None:
        raise ValueError("there is no batch to count. Give at least one.")
    return specialisation(counts, layers=decoder.moe_layers, permutations=permutations, seed=seed)


def untrained(decoder: Decoder, seed: int) -> Decoder:
    """A decoder of the same configuration on the same device, as it was before any training.

    The control of a specialisation: routers that were never trained tell inputs apart, too, as far as these
    look different.
    """
    device = decoder.head_weight.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(decoder.config).to(device).eval()


def specialisation(
    counts: RoutingCounts,
    *,
    layers: Sequence[int] | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Specialisation:
    """What was counted, as information; `layers` are the numbers of the MoE layers (None: 0, 1, ...).

    Raises:
        ValueError: nothing was counted, another number of layers, or no permutation.
    """
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1; the least p is 1 / (1 + that).")
    if not counts.tokens.sum():
        raise ValueError("no token was counted: all were padding or left out. Give at least one a label.")
    layers = range(len(counts.sets)) if layers is None else layers
    if len(layers) != len(counts.sets):
        raise ValueError(f"layers={list(layers)} must name the {len(counts.sets)} layers that were counted.")
    return Specialisation(
        counts.labels,
        tuple(counts.tokens.tolist()),
        tuple(counts.blocks.labels.bincount(minlength=len(counts.labels)).tolist()),
        tuple(
            _layer(counts, index, layer, permutations=permutations, seed=seed)
            for index, layer in enumerate(layers)
        ),
    )


def _layer(
    counts: RoutingCounts, index: int, layer: int, *, permutations: int, seed: int
) -> LayerSpecialisation:
    table, sets = counts.slots[index].numpy(), counts.sets[index]  # (y e)
    label_entropy, information = float(entropy(table.sum(1))), float(mutual_information(table))
    by_block = block_null(
        counts.blocks.slots[:, index].numpy(),
        counts.blocks.labels.numpy(),
        len(counts.labels),
        permutations=permutations,
        seed=seed,
    )
    by_token = None
    if sets.is_complete:
        by_token = token_null(
            sets.sets.numpy(), sets.tokens.numpy(), counts.num_experts, permutations=permutations, seed=seed
        )
    return LayerSpecialisation(
        layer=layer,
        slots=int(table.sum()),
        dropped=int(counts.dropped[index]),
        shares=tuple(tuple((row / row.sum()).tolist()) if row.any() else None for row in table),
        load=tuple((table.sum(0) / max(table.sum(), 1)).tolist()),
        mutual_information=information,
        label_entropy=label_entropy,
        expert_entropy=float(entropy(table.sum(0))),
        normalised=information / label_entropy if label_entropy > 0 else None,
        by_ids=counts.ids.explained(index) if counts.ids is not None and counts.ids.is_complete else None,
        by_block=by_block,
        by_token=by_token,
    )
