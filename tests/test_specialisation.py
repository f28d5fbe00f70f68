"""Which experts the tokens of a label go to: counts, mutual information, and what shuffled labels give."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.modality_config import Modality, ModalityConfig
from moe.modality_sequence import Interleaved
from moe.probes.specialisation.blocks import runs
from moe.probes.specialisation.counts import RoutingCounts, SetCounts
from moe.probes.specialisation.information import (
    Null,
    block_null,
    entropy,
    mutual_information,
    token_null,
)
from moe.probes.specialisation.measure import LabelledBatch, specialisation, specialisation_of
from moe.probes.specialisation.modalities import MODALITIES, modality_batches
from moe.routing import Routing

LABELS = ("text", "image", "sound")


def routing(experts, num_experts: int, mask=None) -> Routing:
    """A routing whose choices are experts (t k)."""
    experts = torch.as_tensor(experts, dtype=torch.int64)
    scores = torch.zeros(len(experts), num_experts)
    return Routing(scores, scores, experts, torch.ones_like(experts, dtype=torch.float32), mask)


def random_choices(draw: np.random.Generator, tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    return np.stack([draw.permutation(num_experts)[:top_k] for _ in range(tokens)])


def bits_by_loops(pairs: list[tuple[int, int]]) -> float:
    """Mutual information of the two members of the pairs, each pair counted once."""
    both, left, right = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    n = len(pairs)
    return sum(c / n * math.log2(c * n / (left[a] * right[b])) for (a, b), c in both.items())


@st.composite
def passes(draw):
    """Forward passes: choices (b s l k) with some dropped, labels (b s) with some left out, masks (b s)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, num_experts))
    layers, count = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    made = []
    for _ in range(count):
        b, s = rng.integers(1, 4), rng.integers(1, 9)
        chosen = np.stack([random_choices(rng, int(b * s), num_experts, top_k) for _ in range(layers)], 1)
        chosen[rng.random(chosen.shape) < 0.1] = num_experts
        labels = rng.integers(-1, len(LABELS), (b, s))
        mask = rng.random((b, s)) < 0.8 if rng.random() < 0.5 else np.ones((b, s), dtype=bool)
        made.append((chosen.reshape(b, s, layers, top_k), labels, mask))
    return made, num_experts


def add_all(counts: RoutingCounts, made, num_experts: int) -> RoutingCounts:
    for chosen, labels, mask in made:
        b, s, layers, k = chosen.shape
        flat = torch.from_numpy(mask.reshape(-1))
        routings = [
            routing(chosen[:, :, layer].reshape(b * s, k), num_experts, flat) for layer in range(layers)
        ]
        counts.add(routings, torch.from_numpy(labels))
    return counts


@given(passes())
def test_counts_and_information_are_those_of_plain_loops(case):
    made, num_experts = case
    counts = add_all(RoutingCounts(LABELS), made, num_experts)
    tokens = Counter(int(label) for _, labels, mask in made for label in labels[mask] if label >= 0)
    assert counts.tokens.tolist() == [tokens[y] for y in range(len(LABELS))]
    if not tokens:
        with pytest.raises(ValueError, match="no token was counted"):
            specialisation(counts)
        return
    found = specialisation(counts, permutations=3)
    for layer in range(made[0][0].shape[2]):
        pairs, dropped = [], 0
        for chosen, labels, mask in made:
            for row, place in np.ndindex(labels.shape):
                if mask[row, place] and labels[row, place] >= 0:
                    for expert in chosen[row, place, layer].tolist():
                        if expert < num_experts:
                            pairs.append((int(labels[row, place]), expert))
                        else:
                            dropped += 1
        slots = Counter(pairs)
        expected = [[slots[y, e] for e in range(num_experts)] for y in range(len(LABELS))]
        assert counts.slots[layer].tolist() == expected
        result = found.layers[layer]
        assert (result.slots, result.dropped) == (len(pairs), dropped)
        assert result.mutual_information == pytest.approx(bits_by_loops(pairs) if pairs else 0, abs=1e-12)
        for y, shares in enumerate(result.shares):
            total = sum(expected[y])
            assert (shares is None) == (total == 0)
            assert shares is None or shares == pytest.approx([c / total for c in expected[y]])
        if pairs:
            load = Counter(expert for _, expert in pairs)
            assert result.load == pytest.approx([load[e] / len(pairs) for e in range(num_experts)])
            p = [c / len(pairs) for c in Counter(y for y, _ in pairs).values()]
            assert result.label_entropy == pytest.approx(-sum(q * math.log2(q) for q in p), abs=1e-12)


@given(passes())
@settings(max_examples=25)
def test_blocks_are_runs_by_plain_loops(case):
    made, num_experts = case
    counts = add_all(RoutingCounts(LABELS), made, num_experts)
    expected: list[int] = []
    for _, labels, mask in made:
        for row in range(len(labels)):
            before = None
            for place in range(labels.shape[1]):
                label = int(labels[row, place]) if mask[row, place] and labels[row, place] >= 0 else None
                if label is not None and label != before:
                    expected.append(label)
                before = label
    assert counts.blocks.labels.tolist() == expected


def test_two_runs_with_one_left_out_token_between_them_are_two():
    labels = torch.tensor([[0, 0, 1, 1], [1, 1, -1, 1]])
    numbers = runs(labels, labels >= 0)
    assert numbers.tolist() == [[1, 1, 2, 2], [3, 3, 4, 5]]


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_that_are_a_function_of_the_label_tell_all_of_it(top_k):
    labels = torch.arange(90).reshape(9, 10) % 3
    choices = labels.reshape(-1, 1) * top_k + torch.arange(top_k)
    counts = RoutingCounts(LABELS)
    counts.add([routing(choices, 3 * top_k)], labels)
    (layer,) = specialisation(counts, permutations=99).layers
    assert layer.mutual_information == pytest.approx(math.log2(3)) == pytest.approx(layer.label_entropy)
    assert layer.normalised == pytest.approx(1)
    assert layer.by_token is not None and layer.by_block.p_value == layer.by_token.p_value == 0.01
    assert layer.expert_entropy == pytest.approx(math.log2(3 * top_k))


def test_experts_that_do_not_look_at_the_label_tell_no_more_than_shuffled_labels():
    draw = np.random.default_rng(0)
    counts = RoutingCounts(LABELS)
    labels = torch.from_numpy(draw.integers(0, 3, (40, 50)))
    counts.add([routing(random_choices(draw, 2000, 8, 2), 8)], labels)
    (layer,) = specialisation(counts, permutations=199).layers
    assert layer.by_token is not None
    for null in (layer.by_block, layer.by_token):
        assert null.p_value > 0.05
        assert null.mean / 2 < null.found < null.quantile_95
    # Miller 1955: (labels - 1)(experts - 1) / (2 n ln 2), times 1 - (k - 1) / (e - 1): choices are distinct.
    expected = 2 * 7 / (2 * 4000 * math.log(2)) * (1 - 1 / 7)
    assert layer.by_token.mean == pytest.approx(expected, rel=0.1)


def test_p_values_of_blocks_are_uniform_where_blocks_have_habits_of_their_own():
    """And those of single tokens are not: what neighbours share looks like information to them."""
    draw = np.random.default_rng(1)
    by_block, by_token = [], []
    for seed in range(200):
        labels = np.repeat(np.arange(2), 8)
        habits = draw.dirichlet(np.ones(4), len(labels))
        slots = np.stack([draw.multinomial(30, habit) for habit in habits])  # (n e)
        by_block.append(block_null(slots, labels, 2, permutations=99, seed=seed).p_value)
        table = np.stack([slots[labels == y].sum(0) for y in range(2)])
        singles = np.arange(4)[:, None]
        by_token.append(token_null(singles, table.T, 4, permutations=99, seed=seed).p_value)
    assert np.mean(by_block) == pytest.approx(0.5, abs=4 * 0.289 / math.sqrt(200))
    for level in (0.05, 0.2, 0.5, 0.8):
        spread = 4 * math.sqrt(level * (1 - level) / 200)
        assert np.mean(np.array(by_block) <= level) == pytest.approx(level, abs=spread)
    assert np.mean(np.array(by_token) <= 0.05) > 0.5


def test_p_values_of_tokens_are_uniform_where_tokens_are_independent():
    draw = np.random.default_rng(2)
    p_values = []
    for seed in range(200):
        sets = np.array(list(itertools.combinations(range(4), 2)))
        tokens = draw.multinomial(60, np.ones(12) / 12).reshape(6, 2)
        p_values.append(token_null(sets, tokens, 4, permutations=99, seed=seed).p_value)
    for level in (0.05, 0.2, 0.5, 0.8):
        spread = 4 * math.sqrt(level * (1 - level) / 200)
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=spread)


def test_p_values_stay_uniform_where_one_label_has_few_and_short_blocks():
    """Where each block weighs 1, whatever its length, a third of these cases has p <= 0.05."""
    draw = np.random.default_rng(3)
    labels = np.repeat(np.arange(2), (6, 24))
    p_values = []
    for seed in range(200):
        habits = draw.dirichlet(20 * np.ones(4), len(labels))
        lengths = np.where(labels == 0, 16, 640)
        slots = np.stack([draw.multinomial(n, habit) for n, habit in zip(lengths, habits, strict=True)])
        null = block_null(slots, labels, 2, permutations=99, seed=seed)
        assert (null.units, null.unit_slots) == (30, 16)
        p_values.append(null.p_value)
    for level in (0.05, 0.2, 0.5, 0.8):
        spread = 4 * math.sqrt(level * (1 - level) / 200)
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=spread)


def test_all_blocks_bring_as_many_slots_as_a_middling_one_of_the_shortest_label():
    slots = np.array([[8, 0], [2, 1], [0, 4], [0, 0], [6, 3], [9, 9], [1, 0]])
    labels = np.array([0, 0, 0, 0, 1, 1, 1])  # medians 4 and 9
    null = block_null(slots, labels, 3, permutations=19, seed=0)
    assert (null.units, null.unit_slots) == (4, 4)
    nothing = block_null(np.zeros((3, 2), dtype=np.int64), np.arange(3), 3, permutations=9, seed=0)
    assert (nothing.units, nothing.found, nothing.p_value) == (0, 0, 1)


def test_dealing_labels_to_sets_is_shuffling_the_labels_of_tokens():
    """Mean and quantiles over all shuffles of six tokens."""
    choices = np.array([[0, 1], [0, 1], [1, 2], [0, 2], [1, 2], [0, 1]])
    labels = np.array([0, 0, 1, 1, 1, 2])
    every = []
    for shuffled in itertools.permutations(labels.tolist()):
        pairs = [(y, e) for y, row in zip(shuffled, choices.tolist(), strict=True) for e in row]
        every.append(bits_by_loops(pairs))
    sets, which = np.unique(choices, axis=0, return_inverse=True)
    tokens = np.zeros((len(sets), 3), dtype=np.int64)
    np.add.at(tokens, (which, labels), 1)
    null = token_null(sets, tokens, 3, permutations=4000, seed=0)
    assert null.mean == pytest.approx(np.mean(every), abs=4 * float(np.std(every)) / math.sqrt(4000))
    true = float(np.mean(np.array(every) >= null.found - 1e-12))
    assert null.p_value == pytest.approx(true, abs=4 * math.sqrt(true * (1 - true) / 4000))
    assert null.units == 6


def test_the_null_of_blocks_is_all_ways_to_give_their_labels():
    slots = np.array([[5, 1, 2], [4, 2, 2], [0, 5, 3], [1, 0, 7], [2, 4, 2]])
    labels = np.array([0, 0, 1, 1, 1])
    every = []
    for shuffled in itertools.permutations(labels.tolist()):
        pairs = [
            (y, e)
            for y, row in zip(shuffled, slots.tolist(), strict=True)
            for e in range(3)
            for _ in range(row[e])
        ]
        every.append(bits_by_loops(pairs))
    null = block_null(slots, labels, 2, permutations=4000, seed=0)
    assert null.found == pytest.approx(every[0])
    assert null.mean == pytest.approx(np.mean(every), abs=4 * float(np.std(every)) / math.sqrt(4000))
    true = float(np.mean(np.array(every) >= every[0] - 1e-12))
    assert null.p_value == pytest.approx(true, abs=4 * math.sqrt(true * (1 - true) / 4000))


def test_the_null_counts_ties_and_itself():
    null = Null.of(0.5, np.array([0.1, 0.5, 0.5 - 1e-15, 0.7]), 10, 2)
    assert (null.p_value, null.permutations, null.units, null.unit_slots) == (4 / 5, 4, 10, 2)
    assert Null.of(0.9, np.array([0.1, 0.5, 0.7]), 10, 2).p_value == 1 / 4
    assert null.mean == pytest.approx(0.45)
    assert null.quantile_95 == pytest.approx(np.quantile([0.1, 0.5, 0.5, 0.7], 0.95))


def random_counts(
    seed: int,
    *,
    relabel: Sequence[int] = (0, 1, 2),
    rename: Sequence[int] = range(5),
    backwards: bool = False,
) -> RoutingCounts:
    draw = np.random.default_rng(seed)
    counts = RoutingCounts([LABELS[i] for i in np.argsort(relabel)])
    parts = []
    for _ in range(4):
        labels, chosen = draw.integers(0, 3, (3, 6)), random_choices(draw, 18, 5, 2)
        chosen[labels.reshape(-1) == 1, 0] = 0
        chosen[chosen[:, 0] == chosen[:, 1], 1] = 4
        parts.append((torch.tensor(relabel)[labels], np.array(rename)[chosen]))
    for labels, chosen in reversed(parts) if backwards else parts:
        counts.add([routing(chosen, 5)], labels)
    return counts


def test_names_of_labels_and_experts_and_the_order_of_batches_do_not_matter():
    (plain,) = specialisation(random_counts(0), permutations=9).layers
    (relabelled,) = specialisation(random_counts(0, relabel=(2, 0, 1)), permutations=9).layers
    (renamed,) = specialisation(random_counts(0, rename=(3, 1, 4, 0, 2)), permutations=9).layers
    (backwards,) = specialisation(random_counts(0, backwards=True), permutations=9).layers
    for other in (relabelled, renamed, backwards):
        assert other.mutual_information == pytest.approx(plain.mutual_information)
        assert other.by_token is not None and other.by_token.found == pytest.approx(other.mutual_information)
        assert other.expert_entropy == pytest.approx(plain.expert_entropy)
    assert plain.shares == backwards.shares
    assert relabelled.by_block.found == pytest.approx(plain.by_block.found)  # the same slots are drawn
    for y, into in enumerate((2, 0, 1)):
        assert relabelled.shares[into] == plain.shares[y]


def test_a_document_goes_on_in_later_passes():
    draw = np.random.default_rng(0)
    chosen, labels = random_choices(draw, 24, 4, 2), torch.tensor([0, 1, 1, 0])
    whole, parts = RoutingCounts(LABELS), RoutingCounts(LABELS)
    whole.add([routing(chosen, 4)], labels, documents=torch.tensor([7, 8, 9, 10]))
    by_sequence = chosen.reshape(4, 6, 2)
    for places in (slice(0, 2), slice(2, 6)):
        piece = by_sequence[:, places]
        parts.add([routing(piece.reshape(-1, 2), 4)], labels, documents=torch.tensor([7, 8, 9, 10]))
    assert torch.equal(whole.blocks.slots, parts.blocks.slots)
    assert whole.blocks.labels.tolist() == parts.blocks.labels.tolist() == [0, 1, 1, 0]
    assert specialisation(whole, permutations=20) == specialisation(parts, permutations=20)


def test_too_many_blocks_are_joined_two_by_two_and_nothing_is_lost():
    draw = np.random.default_rng(0)
    few, all_kept, last = RoutingCounts(LABELS, max_blocks=10), RoutingCounts(LABELS), 0
    for step in range(7):
        chosen, labels = random_choices(draw, 24, 4, 2), torch.from_numpy(draw.integers(0, 3, (4,)))
        documents = torch.arange(4) + 3 * step  # the last goes on in the next pass ...
        labels[0] = last  # ... and keeps its label
        last = int(labels[3])
        for counts in (few, all_kept):
            counts.add([routing(chosen, 4)], labels, documents=documents)
            assert len(counts.blocks.labels) == len(counts.blocks.slots) <= counts.blocks.max_blocks
    assert torch.equal(few.slots, all_kept.slots)
    assert len(few.blocks.labels) > 3
    many = RoutingCounts(("a", "b"), max_blocks=4)
    many.add([routing(random_choices(draw, 100, 4, 1), 4)], torch.arange(100).reshape(1, 100) % 2)
    assert many.blocks.labels.tolist() == [0, 0, 1, 1]
    assert int(many.slots.sum()) == 100


def test_a_set_has_no_order():
    sets = SetCounts(2, 3)
    sets.add(torch.tensor([[4, 0, 2], [2, 4, 0], [0, 2, 3]]), torch.tensor([0, 1, 1]))
    assert (sets.sets.tolist(), sets.tokens.tolist()) == ([[0, 2, 3], [0, 2, 4]], [[0, 1], [1, 1]])


def test_more_sets_than_are_kept_leave_the_null_of_tokens_out():
    sets = SetCounts(2, 1, max_sets=3)
    sets.add(torch.tensor([[0], [1], [0]]), torch.tensor([0, 1, 1]))
    assert (sets.sets.tolist(), sets.tokens.tolist()) == ([[0], [1]], [[1, 1], [0, 1]])
    sets.add(torch.tensor([[2], [3]]), torch.tensor([0, 0]))
    assert not sets.is_complete and not len(sets.sets)
    sets.add(torch.tensor([[2]]), torch.tensor([0]))
    assert not len(sets.sets)
    counts = random_counts(0)
    counts.sets[0] = sets
    (layer,) = specialisation(counts, permutations=9).layers
    assert layer.by_token is None and layer.by_block.permutations == 9


def test_one_label_one_expert_and_all_experts_tell_nothing():
    draw = np.random.default_rng(0)
    labels = torch.from_numpy(draw.integers(0, 2, 8))
    one_label, one_expert, all_experts = (RoutingCounts(("a", "b")) for _ in range(3))
    one_label.add([routing(random_choices(draw, 40, 4, 2), 4)], torch.zeros_like(labels))
    one_expert.add([routing(np.zeros((40, 1)), 1)], labels)
    all_experts.add([routing(random_choices(draw, 40, 4, 4), 4)], labels, documents=torch.arange(8))
    for counts in (one_label, one_expert, all_experts):
        (layer,) = specialisation(counts, permutations=19).layers
        assert layer.mutual_information == pytest.approx(0, abs=1e-12)
        assert layer.by_token is not None
        assert layer.by_block.p_value == layer.by_token.p_value == 1
    (layer,) = specialisation(one_label, permutations=19).layers
    assert (layer.normalised, layer.label_entropy, layer.shares[1]) == (None, 0, None)


def test_a_name_that_no_token_has_changes_nothing_but_its_own_row():
    with_empty = specialisation(random_counts(0), permutations=9)
    counts = RoutingCounts((*LABELS, "video"))
    draw = np.random.default_rng(0)
    for _ in range(4):
        labels, chosen = draw.integers(0, 3, (3, 6)), random_choices(draw, 18, 5, 2)
        chosen[labels.reshape(-1) == 1, 0] = 0
        chosen[chosen[:, 0] == chosen[:, 1], 1] = 4
        counts.add([routing(chosen, 5)], torch.from_numpy(labels))
    found = specialisation(counts, permutations=9)
    assert (found.tokens[3], found.blocks[3], found.layers[0].shares[3]) == (0, 0, None)
    assert found.layers[0].shares[:3] == with_empty.layers[0].shares
    mean, expected = found.layers[0].by_block.mean, with_empty.layers[0].by_block.mean
    assert mean == pytest.approx(expected)


def test_a_layer_that_dropped_everything_has_no_shares():
    counts = RoutingCounts(("a", "b"))
    counts.add([routing(np.full((6, 2), 3), 3)], torch.tensor([0, 1]))
    (layer,) = specialisation(counts, permutations=9).layers
    assert (layer.slots, layer.dropped, layer.shares) == (0, 12, (None, None))
    assert (layer.mutual_information, layer.load) == (0, (0, 0, 0))


def test_what_ids_explain_is_what_plain_loops_say():
    draw = np.random.default_rng(0)
    counts = RoutingCounts(LABELS, vocab_size=6)
    labels, ids = draw.integers(-1, 3, (4, 30)), draw.integers(0, 6, (4, 30))
    chosen = random_choices(draw, 120, 5, 2)
    chosen[draw.random(chosen.shape) < 0.1] = 5
    for part in (slice(0, 1), slice(1, 4)):
        route = routing(chosen.reshape(4, 30, 2)[part].reshape(-1, 2), 5)
        counts.add([route], torch.from_numpy(labels[part]), ids=torch.from_numpy(ids[part]))
    experts_of, count_of = Counter(), Counter()
    for y, i, row in zip(labels.flatten().tolist(), ids.flatten().tolist(), chosen.tolist(), strict=True):
        if y >= 0:
            count_of[i] += 1
            for e in row:
                experts_of[i, e] += 1
    table = np.zeros((3, 5))
    for y, i in zip(labels.flatten().tolist(), ids.flatten().tolist(), strict=True):
        if y >= 0:
            table[y] += [experts_of[i, e] / count_of[i] for e in range(5)]
    (layer,) = specialisation(counts, permutations=3).layers
    assert layer.by_ids == pytest.approx(mutual_information(table), abs=1e-12)


def test_routing_by_id_is_explained_and_routing_by_label_is_not():
    labels = torch.arange(8).repeat_interleave(50).reshape(8, 50) % 2
    ids = torch.randint(4, (8, 50)) + 2 * labels  # 2 and 3 under both labels
    by_id, by_label = RoutingCounts("ab", vocab_size=6), RoutingCounts("ab", vocab_size=6)
    by_id.add([routing(ids.reshape(-1, 1), 6)], labels, ids=ids)
    by_label.add([routing(labels.reshape(-1, 1), 2)], labels, ids=torch.zeros_like(ids))
    (layer,) = specialisation(by_id, permutations=9).layers
    assert layer.by_ids == pytest.approx(layer.mutual_information)
    assert 0.3 < layer.mutual_information < 0.7
    (layer,) = specialisation(by_label, permutations=9).layers
    assert layer.mutual_information == pytest.approx(1) and layer.by_ids == pytest.approx(0)


def test_ids_of_a_vast_vocabulary_are_not_kept():
    counts = RoutingCounts("ab", vocab_size=2**24)
    labels = torch.tensor([0, 1])
    counts.add([routing([[0], [1]], 2)], labels, ids=torch.tensor([[5], [6]]))
    assert counts.ids is not None and not counts.ids.slots.numel()
    assert specialisation(counts, permutations=9).layers[0].by_ids is None


def test_entropy_and_information_of_known_tables():
    assert entropy(np.array([[1, 1, 1, 1], [4, 0, 0, 0], [0, 0, 0, 0]])).tolist() == [2, 0, 0]
    table = np.array([[30, 10], [10, 30]])
    expected = 1 - (-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25))
    assert mutual_information(table) == pytest.approx(expected)
    assert mutual_information(np.stack([table, table * 7])) == pytest.approx([expected] * 2)


CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    moe_intermediate_size=8,
    intermediate_size=16,
    first_k_dense_replace=1,
    num_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.5,
)


def test_a_decoder_is_counted_as_its_own_routings_say():
    decoder = Decoder(CONFIG).train()
    ids = torch.randint(32, (3, 7))
    labels = torch.randint(2, (3, 7))
    batches = [LabelledBatch(ids[:2], labels[:2]), LabelledBatch(ids[2:], labels[2:])]
    seen: list[int] = []
    found = specialisation_of(decoder, batches, labels=("a", "b"), permutations=9, progress=seen.append)
    assert decoder.training and seen == [14, 7]
    assert [layer.layer for layer in found.layers] == [1, 2] == list(decoder.moe_layers)
    for layer, route in zip(found.layers, decoder.hidden(ids).routings, strict=True):
        pairs = [
            (y, e)
            for y, row in zip(labels.flatten().tolist(), route.experts.tolist(), strict=True)
            for e in row
        ]
        assert layer.mutual_information == pytest.approx(bits_by_loops(pairs))
        assert layer.load == pytest.approx((route.tokens_per_expert() / len(pairs)).tolist())
    embedded = [LabelledBatch(decoder.embed(ids).detach(), labels)]
    again = specialisation_of(decoder, embedded, labels=("a", "b"), permutations=9)
    assert [one.shares for one in again.layers] == [one.shares for one in found.layers]


def test_padding_is_not_counted():
    decoder = Decoder(CONFIG)
    ids = torch.randint(32, (2, 9))
    labels = torch.tensor([0, 1])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    padded = specialisation_of(decoder, [LabelledBatch(ids, labels, mask)], labels=("a", "b"), permutations=9)
    alone = specialisation_of(
        decoder,
        [LabelledBatch(ids[:1], labels[:1]), LabelledBatch(ids[1:, :5], labels[1:])],
        labels=("a", "b"),
        permutations=9,
    )
    assert padded == alone
    assert padded.tokens == (9, 5) and padded.layers[0].dropped == 0


def test_bad_labels_documents_and_routings_are_refused():
    counts = RoutingCounts(("a", "b"))
    route, labels = routing([[0], [1], [0], [1]], 2), torch.zeros(2, 2, dtype=torch.int64)
    refused = [
        ("no MoE layer", lambda: counts.add([], labels)),
        ("label 2 has no name", lambda: counts.add([route], labels + 2)),
        ("label -2 has no name", lambda: counts.add([route], labels - 2)),
        ("labels must be int64", lambda: counts.add([route], labels.float())),
        ("labels must be int64", lambda: counts.add([route], labels[:0])),
        ("labels must be int64", lambda: counts.add([route], labels[None])),
        (r"labels \(3,\) do not fit 4 tokens", lambda: counts.add([route], torch.zeros(3).long())),
        (r"labels \(2, 3\) do not fit", lambda: counts.add([route], torch.zeros(2, 3).long())),
        (
            r"documents \(4,\) do not fit",
            lambda: counts.add([route], labels, documents=torch.zeros(4).long()),
        ),
        (
            "differ between layers",
            lambda: counts.add([route, routing([[0, 1]] * 4, 2)], labels),
        ),
        (
            "document 5 has labels",
            lambda: counts.add([route], torch.tensor([[0, 0], [0, 1]]), documents=torch.tensor([4, 5])),
        ),
    ]
    refused += [
        ("ids are given with vocab_size=None", lambda: counts.add([route], labels, ids=labels)),
        ("ids are missing", lambda: RoutingCounts("ab", vocab_size=4).add([route], labels)),
        (
            r"ids must be int64 \(2, 2\)",
            lambda: RoutingCounts("ab", vocab_size=4).add([route], labels, ids=labels[0]),
        ),
        (
            "ids go from 4 to 4",
            lambda: RoutingCounts("ab", vocab_size=4).add([route], labels, ids=labels + 4),
        ),
    ]
    for words, call in refused:
        with pytest.raises(ValueError, match=words):
            call()
    counts.add([route], labels, documents=torch.tensor([1, 2]))
    before = counts.slots.clone()
    with pytest.raises(ValueError, match="document 2 has labels 0 and 1"):
        counts.add([route], labels + 1, documents=torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="one model at a time"):
        counts.add([route, route], labels)
    with pytest.raises(ValueError, match="one model at a time"):
        counts.add([routing([[0], [1], [0], [1]], 3)], labels)
    assert torch.equal(counts.slots, before) and counts.tokens.tolist() == [4, 0]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="names, at least one and each once"):
        RoutingCounts([])
    with pytest.raises(ValueError, match="names, at least one and each once"):
        RoutingCounts(["a", "a"])
    with pytest.raises(ValueError, match="max_blocks=3 must be at least 4"):
        RoutingCounts(["a", "b"], max_blocks=3)
    with pytest.raises(ValueError, match="permutations=0"):
        specialisation(random_counts(0), permutations=0)
    with pytest.raises(ValueError, match="must name the 1 layers"):
        specialisation(random_counts(0), layers=[0, 1])
    with pytest.raises(ValueError, match="no token was counted"):
        specialisation(RoutingCounts(["a"]))
    with pytest.raises(ValueError, match="there is no batch"):
        specialisation_of(Decoder(CONFIG), [], labels=["a"])
    dense = Decoder(
        DecoderConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    )
    batch = LabelledBatch(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="no MoE layer"):
        specialisation_of(dense, [batch], labels=["a"])


def senses(draw: np.random.Generator, runs: list[tuple[int, int]], width: int) -> Interleaved:
    """Runs of (modality, tokens) with random content."""
    modality = torch.cat([torch.full((n,), m, dtype=torch.uint8) for m, n in runs])
    ids = torch.from_numpy(draw.integers(0, 256, len(modality)).astype(np.uint8))
    ids[modality != Modality.TEXT] = 0
    features = torch.from_numpy(draw.random((int((modality != 0).sum()), width), dtype=np.float32))
    return Interleaved(ids, modality, features)


def test_modalities_are_labels_and_their_runs_are_blocks():
    draw, modalities = np.random.default_rng(0), ModalityConfig(patch_size=2, num_mel_bins=4)
    decoder = Decoder(replace(CONFIG, vocab_size=256, modalities=modalities))
    sequences = [
        senses(draw, [(0, 7), (1, 5), (0, 3), (3, 5), (2, 4)], modalities.feature_size),
        senses(draw, [(2, 6), (0, 9), (1, 1)], modalities.feature_size),
    ]
    batches = list(modality_batches(decoder, sequences, length=10))
    shapes = [tuple(batch.inputs.shape) for batch in batches]
    assert shapes == [(2, 10, 16), (1, 4, 16), (1, 10, 16), (1, 6, 16)]
    found = specialisation_of(decoder, batches, labels=MODALITIES, permutations=9)
    assert found.labels == ("text", "image", "video", "audio")
    assert found.tokens == (19, 6, 10, 5)
    assert found.blocks == (4, 3, 2, 1)  # the image of 5 and the text of 9 are cut by the end of a piece
    counts = RoutingCounts(MODALITIES)
    for sequence in sequences:
        for piece in sequence.pieces(10):
            ids, modality, features = (one[None] for one in piece.dense())
            embedded = decoder.embed(ids, modality, features)
            counts.add(decoder.hidden(inputs_embeds=embedded).routings, modality)
    assert specialisation(counts, layers=decoder.moe_layers, permutations=9).layers == found.layers
    with pytest.raises(ValueError, match="length=0"):
        next(modality_batches(decoder, sequences, length=0))


def test_a_router_that_was_never_trained_tells_modalities_apart():
    """Which is why untrained models are the control: text is drawn from other vectors than pixels are."""
    draw, modalities = np.random.default_rng(0), ModalityConfig(patch_size=2, num_mel_bins=4)
    decoder = Decoder(replace(CONFIG, vocab_size=256, modalities=modalities))
    runs = [(int(m), 12) for m in draw.permutation(np.arange(80) % 4)]
    batches = modality_batches(decoder, [senses(draw, runs, modalities.feature_size)], length=960)
    found = specialisation_of(decoder, batches, labels=MODALITIES, permutations=99)
    assert found.layers[0].by_block.p_value == 0.01
    assert found.layers[0].by_block.found > 2 * found.layers[0].by_block.quantile_99
