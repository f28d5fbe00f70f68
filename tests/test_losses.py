"""Each convention has its formula and its value at uniform routing; padding counts for nothing.

n_e pairs sent to expert e, f_e = n_e / (k t), P_e the mean over tokens of the score of e, normalised.
"""

import pytest
import torch
from decoder_variants import drawn, tokens
from helpers import assert_same, tiny_config

from moe.losses import (
    load_balancing_loss,
    max_violation,
    pointer_loss,
    router_z_loss,
    uniform_value,
)
from moe.routing import Router, Routing

CONVENTIONS = ("hf", "megatron", "olmo", "megablocks")
EVERY_CONVENTION = pytest.mark.parametrize("convention", CONVENTIONS)


def route(logits, top_k=2, score="softmax", mask=None) -> Routing:
    """What a plain router decides on given logits (t e)."""
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    weights, experts = scores.topk(top_k, dim=-1)
    if mask is not None:
        experts = experts.masked_fill(~mask[:, None], logits.shape[1])
        weights = weights.masked_fill(~mask[:, None], 0)
    return Routing(logits=logits, scores=scores, experts=experts, weights=weights, mask=mask)


def random_logits(tokens=30, experts=6, layers=None, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, experts) if layers is None else (layers, tokens, experts)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * spread


def balanced(tokens=24, experts=6, top_k=2) -> torch.Tensor:
    """Logits under which every expert gets the same number of pairs and the same mean score."""
    logits = torch.zeros(tokens, experts, dtype=torch.float64)
    for token in range(tokens):
        for choice in range(top_k):
            logits[token, (token * top_k + choice) % experts] = 3.0 - 1e-6 * choice
    return logits


def by_hand(routing) -> torch.Tensor:
    """e Σ f_e P_e over the real tokens of one layer."""
    real = torch.ones(len(routing.experts), dtype=torch.bool) if routing.mask is None else routing.mask
    e, k, t = routing.scores.shape[1], routing.experts.shape[1], int(real.sum())
    f = torch.bincount(routing.experts[real].flatten(), minlength=e).double() / (k * t)
    scores = routing.scores[real]
    return e * (f * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()


UNIFORM = {"hf": 2.0, "megatron": 1.0, "olmo": 1.0, "megablocks": 1.0}  # of one layer, k = 2
ADDS_LAYERS = {"megatron", "olmo"}  # the others average
OLMO_EPS = 1e-6  # it adds 1e-7 to every score


@EVERY_CONVENTION
@pytest.mark.parametrize("layers", [1, 3])
def test_uniform_routing_has_the_value_of_its_convention(convention, layers):
    expected = torch.tensor(UNIFORM[convention] * (layers if convention in ADDS_LAYERS else 1))
    loss = load_balancing_loss([route(balanced())] * layers, convention=convention)
    assert loss.ndim == 0
    assert_same(loss, expected, tolerance=1e-6)
    equal_scores = [route(torch.zeros(24, 6, dtype=torch.float64))] * layers
    assert_same(load_balancing_loss(equal_scores, convention=convention), expected)
    assert uniform_value(convention, layers, 2) == expected


@EVERY_CONVENTION
def test_all_tokens_on_the_same_k_experts_cost_e_over_k_times_uniform(convention):
    logits = torch.full((10, 8), -1e3, dtype=torch.float64)
    logits[:, [3, 5]] = 0.0
    loss = load_balancing_loss([route(logits)], convention=convention)
    assert_same(loss, torch.tensor(8 / 2 * UNIFORM[convention]), tolerance=OLMO_EPS)


@EVERY_CONVENTION
def test_one_layer_costs_e_times_the_sum_of_load_and_score(convention):
    routing = route(random_logits())
    scale = routing.experts.shape[1] if convention == "hf" else 1
    assert_same(
        load_balancing_loss([routing], convention=convention), scale * by_hand(routing), tolerance=OLMO_EPS
    )


@pytest.mark.parametrize("convention", ["megatron", "olmo", "megablocks"])
def test_several_layers_cost_the_sum_of_each_or_the_mean(convention):
    routings = [route(logits) for logits in random_logits(layers=3)]
    each = torch.stack([load_balancing_loss([routing], convention=convention) for routing in routings])
    expected = each.sum() if convention in ADDS_LAYERS else each.mean()
    assert_same(load_balancing_loss(routings, convention=convention), expected)


def test_the_hugging_face_convention_averages_layers_before_the_product():
    routings = [route(logits) for logits in random_logits(layers=3)]
    f = torch.stack([torch.bincount(r.experts.flatten(), minlength=6).double() / 30 for r in routings]).mean(
        0
    )
    scores = torch.stack([routing.scores.mean(0) for routing in routings]).mean(0)
    assert_same(
        load_balancing_loss(routings, convention="hf"), 6 * (f * scores).sum(), tolerance=1e-6
    )  # counts are float32


def test_opposite_imbalances_of_two_layers_cancel_only_under_the_hugging_face_convention():
    logits = torch.full((10, 4), -1e3, dtype=torch.float64)
    low, high = logits.clone(), logits.clone()
    low[:, :2], high[:, 2:] = 0, 0
    pair = [route(low), route(high)]
    assert_same(load_balancing_loss(pair, convention="hf"), torch.tensor(uniform_value("hf", 2, 2)))
    for convention in ("megatron", "olmo", "megablocks"):
        worst = 4 / 2 * uniform_value(convention, 2, 2)
        assert_same(load_balancing_loss(pair, convention=convention), torch.tensor(worst), tolerance=OLMO_EPS)


@pytest.mark.parametrize("convention", ["megatron", "olmo"])
def test_sigmoid_scores_are_normalised_to_sum_to_one(convention):
    routing = route(random_logits(), score="sigmoid")
    assert_same(load_balancing_loss([routing], convention=convention), by_hand(routing), tolerance=1e-6)


def test_pushing_all_sigmoid_scores_down_saves_nothing():
    """Far below 0 the sigmoid is exp, and a common factor cancels."""
    high, low = (route(random_logits(spread=0.5) - shift, score="sigmoid") for shift in (20, 30))
    assert_same(load_balancing_loss([low]), load_balancing_loss([high]), tolerance=1e-5)


def test_megablocks_reads_a_sigmoid_router_as_softmax_scores_and_real_choices():
    router = Router(tiny_config(scoring_func="sigmoid", use_selection_bias=True, router_dtype="float64"))
    router.e_score_correction_bias.copy_(torch.linspace(-1, 1, 8))
    routing = router(torch.randn(50, 12))
    counts = torch.bincount(routing.experts.flatten(), minlength=8).double()
    expected = 8 * (counts / 100 * routing.logits.softmax(-1).mean(0)).sum()
    assert_same(load_balancing_loss([routing], convention="megablocks"), expected)


# Sequences


@pytest.mark.parametrize("convention", ["megatron", "olmo"])
def test_sequence_granularity_is_the_mean_over_sequences(convention):
    logits = random_logits(tokens=30)
    each = [load_balancing_loss([route(part)], convention=convention) for part in logits.split(6)]
    whole = load_balancing_loss([route(logits)], convention=convention, granularity="sequence", sequences=5)
    assert_same(whole, torch.stack(each).mean())
    assert abs(whole - load_balancing_loss([route(logits)], convention=convention)) > 1e-3


def test_one_sequence_is_the_whole_layer():
    routings = [route(logits) for logits in random_logits(layers=2)]
    assert_same(
        load_balancing_loss(routings, granularity="sequence", sequences=1),
        load_balancing_loss(routings, granularity="layer"),
    )


def test_sequence_granularity_leaves_padding_out():
    logits, mask = (
        random_logits(tokens=30),
        torch.arange(30) % 10 < 8,
    )  # three sequences, two padding tokens each
    each = [load_balancing_loss([route(part[:8])]) for part in logits.split(10)]
    whole = load_balancing_loss([route(logits, mask=mask)], granularity="sequence", sequences=3)
    assert_same(whole, torch.stack(each).mean())


def test_a_sequence_of_padding_alone_costs_nothing_and_is_finite():
    logits = random_logits(tokens=30).requires_grad_()
    mask = torch.arange(30) >= 10
    loss = load_balancing_loss([route(logits, mask=mask)], granularity="sequence", sequences=3)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert (logits.grad[:10] == 0).all()


def test_tokens_that_do_not_divide_into_sequences_are_refused():
    with pytest.raises(ValueError, match=r"30.*sequences=7|sequences=7.*30"):
        load_balancing_loss([route(random_logits(tokens=30))], granularity="sequence", sequences=7)


# Padding, emptiness, gradients


@EVERY_CONVENTION
def test_padding_tokens_count_for_nothing(convention):
    logits, mask = random_logits(layers=2), torch.arange(30) % 4 != 2
    padded = load_balancing_loss([route(layer, mask=mask) for layer in logits], convention=convention)
    alone = load_balancing_loss([route(layer[mask]) for layer in logits], convention=convention)
    assert_same(padded, alone)


@EVERY_CONVENTION
@pytest.mark.parametrize("padding", [False, True], ids=["no tokens", "padding only"])
def test_nothing_to_balance_costs_zero(convention, padding):
    tokens = 5 if padding else 0
    mask = torch.zeros(tokens, dtype=torch.bool) if padding else None
    logits = random_logits(tokens=tokens).requires_grad_()
    routing = route(logits, mask=mask)
    loss = load_balancing_loss([routing], convention=convention) + router_z_loss(routing)
    assert loss == 0
    loss.backward()
    assert (logits.grad == 0).all()


@EVERY_CONVENTION
def test_gradient_flows_through_scores_only(convention):
    """The gradient is that of the formula with the counts held fixed."""
    logits = random_logits().requires_grad_()
    routing = route(logits)
    loss = load_balancing_loss([routing], convention=convention)
    (ours,) = torch.autograd.grad(loss, logits)
    counts = torch.bincount(routing.experts.flatten(), minlength=6).double()
    scale = 2 if convention == "hf" else 1
    expected = scale * 6 * (counts / 60 * logits.softmax(-1).mean(0)).sum()
    (theirs,) = torch.autograd.grad(expected, logits)
    assert_same(ours, theirs, tolerance=OLMO_EPS)


@EVERY_CONVENTION
def test_a_step_against_the_gradient_lowers_the_loss_and_evens_the_scores(convention):
    logits = (
        random_logits(tokens=200) + torch.tensor([2.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    ).requires_grad_()
    loss = load_balancing_loss([route(logits)], convention=convention)
    loss.backward()
    after = load_balancing_loss([route(logits.detach() - 50 * logits.grad)], convention=convention)
    assert after < loss


@EVERY_CONVENTION
def test_losses_of_bfloat16_scores_are_computed_in_float32(convention):
    logits = random_logits(tokens=3000).bfloat16()
    loss = load_balancing_loss([route(logits)], convention=convention)
    assert loss.dtype == torch.float32
    truth = load_balancing_loss([route(logits.double())], convention=convention)
    # Ties of bfloat16 scores may be broken either way; sums of 3000 in bfloat16 would be off by percents.
    assert abs(loss - truth) < 5e-3 * truth


def test_z_loss_is_the_mean_square_of_logsumexp():
    logits = random_logits().requires_grad_()
    loss = router_z_loss(route(logits))
    expected = (logits.exp().sum(-1).log() ** 2).mean()
    assert loss.ndim == 0
    assert_same(loss, expected)
    assert_same(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])
    assert router_z_loss(route(torch.full((4, 8), 200.0))).isfinite()


def test_z_loss_leaves_padding_out():
    logits, mask = random_logits(), torch.arange(30) < 11
    assert_same(router_z_loss(route(logits, mask=mask)), router_z_loss(route(logits[:11])))


def test_z_loss_reads_logits_and_not_scores():
    """A sigmoid router with a selection bias has the same z-loss as the same logits under a softmax."""
    config = {"router_dtype": "float64"}
    plain = Router(tiny_config(**config))
    biased = Router(tiny_config(scoring_func="sigmoid", use_selection_bias=True, **config))
    biased.load_state_dict({"weight": plain.weight.detach(), "e_score_correction_bias": torch.arange(8.0)})
    x = torch.randn(9, 12)
    assert_same(router_z_loss(plain(x)), router_z_loss(biased(x)))


def test_max_violation_is_the_largest_load_over_the_mean_minus_one():
    assert max_violation(torch.tensor([3, 3, 3, 3])) == 0
    assert max_violation(torch.tensor([8, 0, 0, 0])) == 3
    assert max_violation(torch.tensor([1, 2, 3, 6])) == 1
    assert max_violation(torch.tensor([0, 0, 0])) == 0
    assert max_violation(torch.tensor([1, 2])).is_floating_point()


# transformers' own function, where it is installed


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("padding", [False, True], ids=["all real", "attention mask"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_hugging_face_convention_is_what_transformers_returns(layers, padding, top_k):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = random_logits(layers=layers).float()
    attention_mask = (torch.arange(30).view(3, 10) % 10 < torch.tensor([[10], [4], [7]])) if padding else None
    mask = attention_mask.flatten() if padding else None
    theirs = mixtral.load_balancing_loss_func(
        tuple(logits), 6, top_k, attention_mask.long() if padding else None
    )
    ours = load_balancing_loss([route(layer, top_k, mask=mask) for layer in logits], convention="hf")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_transformers_sees_any_router_as_a_softmax_router_and_so_does_the_hugging_face_convention(score):
    """Its function recomputes softmax and top-k from the logits, whatever the router made of them."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    router = Router(tiny_config(scoring_func=score, use_selection_bias=True, initializer_range=1.0))
    router.e_score_correction_bias.copy_(torch.linspace(-1, 1, 8))
    routing = router(torch.randn(50, 12))
    ours = load_balancing_loss([routing], convention="hf")
    torch.testing.assert_close(ours, mixtral.load_balancing_loss_func((routing.logits,), 8, 2))


# Bad input


def test_unknown_words_are_refused_with_the_known_ones():
    routing = route(random_logits())
    with pytest.raises(ValueError, match=r"(?s)megatrom.*megatron"):
        load_balancing_loss([routing], convention="megatrom")
    with pytest.raises(ValueError, match=r"(?s)token.*sequence"):
        load_balancing_loss([routing], granularity="token")


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="routing"):
        load_balancing_loss([])


def test_the_hugging_face_convention_has_no_sequence_form():
    with pytest.raises(ValueError, match="hf"):
        load_balancing_loss([route(random_logits())], convention="hf", granularity="sequence", sequences=3)


def test_megatron_counts_what_the_scores_choose_and_not_what_the_bias_chose():
    torch.manual_seed(0)
    router = Router(tiny_config(scoring_func="sigmoid", use_selection_bias=True))
    router.e_score_correction_bias[0] = 10.0  # everybody chooses expert 0
    x = torch.randn(40, router.config.hidden_size)
    biased = router(x)
    router.e_score_correction_bias.zero_()
    assert not torch.equal(biased.experts, router(x).experts)
    assert_same(
        load_balancing_loss(biased, convention="megatron"),
        load_balancing_loss(router(x), convention="megatron"),
    )
    assert load_balancing_loss(biased, convention="olmo") != load_balancing_loss(router(x), convention="olmo")


@pytest.mark.parametrize(("granularity", "sequences"), [("sequence", None), ("sequence", 0), ("layer", 4)])
def test_the_number_of_sequences_goes_with_the_granularity(granularity, sequences):
    routing = route(random_logits(tokens=8))
    with pytest.raises(ValueError, match="sequences"):
        load_balancing_loss(routing, granularity=granularity, sequences=sequences)


# The pointer loss


def pointed(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Queries (b n m c), keys (b g l c), places and pointers (b m); a row without any."""
    queries, keys = torch.randn(3, 4, 5, 6, dtype=dtype), torch.randn(3, 2, 9, 6, dtype=dtype)
    places = torch.tensor([[0, 2, 5, 6, 8], [1, 2, 3, 4, 5], [4, 5, 6, 7, 8]])
    pointers = torch.tensor([[0, 1, -1, 6, 3], [-1] * 5, [0, 5, -1, -1, 2]])
    return queries.requires_grad_(), keys.requires_grad_(), places, pointers


def pointer_loss_by_loops(queries, keys, places, pointers):
    terms = []
    for row in range(len(queries)):
        for i, (place, pointer) in enumerate(zip(places[row].tolist(), pointers[row].tolist(), strict=True)):
            for head in range(queries.shape[1] if pointer >= 0 else 0):
                own = keys[row, head * keys.shape[1] // queries.shape[1]]
                weights = [(queries[row, head, i] @ own[key]).exp() for key in range(place + 1)]
                terms.append(-(weights[pointer] / sum(weights)).log())
    return sum(terms) / len(terms)


def test_the_pointer_loss_is_its_definition_in_value_and_gradients():
    queries, keys, places, pointers = pointed()
    ours, truth = (loss(queries, keys, places, pointers) for loss in (pointer_loss, pointer_loss_by_loops))
    assert ours.dtype == torch.float64
    assert_same(ours, truth)
    gradients = (torch.autograd.grad(loss, [queries, keys]) for loss in (ours, truth))
    for our, true in zip(*gradients, strict=True):
        assert_same(our, true)


def test_the_pointer_loss_of_bfloat16_queries_is_computed_in_float32():
    queries, keys, places, pointers = pointed(torch.bfloat16)
    queries = queries * 10  # logits of a trained model
    truth = pointer_loss(queries.double(), keys.double(), places, pointers)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ours = pointer_loss(queries, keys, places, pointers)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_nothing_to_point_at_costs_zero_with_zero_gradients():
    queries, keys, places, pointers = pointed()
    loss = pointer_loss(queries, keys, places, torch.full_like(pointers, -1))
    assert loss == 0
    for gradient in torch.autograd.grad(loss, [queries, keys]):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("place", [0, 3, 8])
def test_uniform_attention_costs_the_logarithm_of_the_places_seen(place):
    queries, keys = torch.zeros(1, 4, 1, 6), torch.randn(1, 2, 9, 6)
    loss = pointer_loss(queries, keys, torch.tensor([[place]]), torch.tensor([[place // 2]]))
    torch.testing.assert_close(loss, torch.tensor(place + 1.0).log())


def test_the_pointer_loss_of_a_decoder_is_what_its_attention_pays():
    decoder = drawn("logits grow with the keys")
    ids, places = tokens(), torch.tensor([[3, 9], [5, 10]])
    pointers = torch.tensor([[2, -1], [5, 0]])
    some, whole = decoder.hidden(ids, at=places).attended, decoder.hidden(ids).attended
    loss = pointer_loss(some.queries, some.keys, places, pointers)
    paid = []
    for row, place, pointer in [(0, 3, 2), (1, 5, 5), (1, 10, 0)]:
        for head in range(6):
            logits = whole.keys[row, head // 3, : place + 1] @ whole.queries[row, head, place]
            paid.append(-logits.log_softmax(0)[pointer])
    assert_same(loss, torch.stack(paid).mean())
