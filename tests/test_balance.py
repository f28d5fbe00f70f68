"""The selection bias moves by the sign of each expert's shortfall, centred, and evens out a skewed router."""

import pytest
import torch
from helpers import assert_same, fill, tiny_config

from moe.balance import add_selection_bias, update_selection_bias
from moe.losses import max_violation
from moe.routing import Router


def make_router(**changes) -> Router:
    return Router(
        tiny_config(**({"use_selection_bias": True, "scoring_func": "sigmoid", "num_experts": 4} | changes))
    )


def step_of(counts, rate=1e-3, before=None):
    router = make_router(num_experts=len(counts))
    if before is not None:
        router.e_score_correction_bias.copy_(before)
    start = router.e_score_correction_bias.clone()
    assert update_selection_bias(router, torch.tensor(counts), rate) is None
    return router.e_score_correction_bias - start


def test_the_bias_rises_by_the_rate_where_load_is_short_and_falls_where_it_is_over():
    assert_same(step_of([1, 3, 3, 1], rate=0.25), torch.tensor([0.25, -0.25, -0.25, 0.25]))


def test_the_size_of_the_imbalance_does_not_matter_only_its_sign():
    assert torch.equal(step_of([1, 3, 3, 1]), step_of([0, 1000, 501, 499]))


def test_the_update_is_centred_so_that_the_biases_keep_their_sum():
    """Signs (+, +, +, -) have mean 1/2, which is taken off every expert."""
    step = step_of([0, 0, 0, 40], rate=0.5)
    assert_same(step, torch.tensor([0.25, 0.25, 0.25, -0.75]))
    assert step.sum() == 0


def test_an_expert_at_the_mean_moves_only_by_the_centring():
    step = step_of([2, 2, 5, 0, 1], rate=1.0)  # mean 2: signs 0, 0, -, +, +
    assert_same(step, torch.tensor([0.0, 0, -1, 1, 1]) - 0.2, tolerance=1e-6)


@pytest.mark.parametrize(
    "counts",
    [[7] * 4, [0] * 4, [12345678] * 60],
    ids=["equal", "no tokens", "beyond the integers of float32"],
)
def test_equal_loads_change_nothing(counts):
    for before in (None, torch.linspace(-0.3, 1 / 3, len(counts))):
        assert torch.equal(step_of(counts, before=before), torch.zeros(len(counts)))


def test_the_default_rate_is_a_thousandth():
    router = make_router()
    update_selection_bias(router, torch.tensor([1, 3, 3, 1]))
    assert_same(router.e_score_correction_bias, torch.tensor([1e-3, -1e-3, -1e-3, 1e-3]), tolerance=1e-9)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_counts_may_have_any_number_type(dtype):
    router = make_router()
    update_selection_bias(router, torch.tensor([1, 3, 3, 1], dtype=dtype), 0.5)
    assert router.e_score_correction_bias.tolist() == [0.5, -0.5, -0.5, 0.5]


def test_the_update_stays_float32_in_a_bfloat16_model_and_small_steps_add_up():
    """In bfloat16, 1 + 0.001 is 1 again."""
    router = make_router().to(torch.bfloat16)
    router.e_score_correction_bias.copy_(torch.tensor([1.0, 1, 1, 1]))
    for _ in range(100):
        update_selection_bias(router, torch.tensor([1, 3, 3, 1]), 1e-3)
    assert router.e_score_correction_bias.dtype == torch.float32
    assert_same(router.e_score_correction_bias, torch.tensor([1.1, 0.9, 0.9, 1.1]), tolerance=1e-5)


def test_the_update_is_no_part_of_the_graph_and_changes_no_parameter():
    router = make_router()
    weight = router.weight.detach().clone()
    routing = router(torch.randn(9, 12))
    update_selection_bias(router, routing.tokens_per_expert())
    assert not router.e_score_correction_bias.requires_grad
    assert torch.equal(router.weight, weight)
    routing.weights.sum().backward()  # the graph of the forward pass before the update is intact
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_repeated_updates_even_out_a_skewed_router(score):
    router = fill(make_router(num_experts=8, scoring_func=score))
    x = (
        torch.randn(512, 12, generator=torch.Generator().manual_seed(0)) + 0.5
    )  # a mean that favours some experts
    first = max_violation(router(x).tokens_per_expert())
    with torch.no_grad():
        for step in range(300):
            update_selection_bias(router, router(x).tokens_per_expert(), 0.02 * 0.98**step)
    last = max_violation(router(x).tokens_per_expert())
    assert first > 0.5
    assert last < 0.1


def test_a_router_without_a_selection_bias_is_refused():
    with pytest.raises(ValueError, match="use_selection_bias"):
        update_selection_bias(Router(tiny_config()), torch.ones(8))


def test_an_added_selection_bias_is_zero_float32_and_can_be_moved():
    router = Router(tiny_config()).bfloat16()
    x = torch.randn(20, 12).bfloat16()
    before = router(x)
    add_selection_bias(router)
    after = router(x)
    assert torch.equal(after.experts, before.experts) and torch.equal(after.weights, before.weights)
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router.config.use_selection_bias and "e_score_correction_bias" in router.state_dict()
    update_selection_bias(router, torch.arange(8), rate=10.0)
    assert set(router(x).experts.unique().tolist()) <= {0, 1, 2, 3}


def test_a_second_selection_bias_is_refused():
    with pytest.raises(ValueError, match="already"):
        add_selection_bias(make_router())


def test_counts_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"5.*4|4.*5"):
        update_selection_bias(make_router(), torch.ones(5))
