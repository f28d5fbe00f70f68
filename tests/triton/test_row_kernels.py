"""The kernels that move and add rows, each against a line of torch in float64."""

import pytest
import torch
from device import DEVICE
from helpers import ACTIVATIONS, AWKWARD_ROUTINGS, GATED, assert_as_accurate, drop, random_experts

from moe.ops import reference
from moe_triton import activate, combine, dispatch
from moe_triton.rows import (
    combine_grads,
    expert_sums,
    gather_rows,
    row_dots,
    sum_rows,
    weight_grads,
    zero_rest,
)

ROUTINGS = pytest.mark.parametrize("name", AWKWARD_ROUTINGS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
D = 37  # columns: no power of two, and not all in one block of 16


class Case:
    """A routing, its plan, and matrices on tokens and rows; rows of nobody hold NaN."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, d: int = D) -> None:
        experts, self.e = AWKWARD_ROUTINGS[name]
        self.t, self.k = experts.shape
        self.pair_of_row, self.row_of_pair, self.offsets = (
            tensor.to(DEVICE) for tensor in reference.sort_by_expert(experts, self.e)
        )
        self.kept = int(self.offsets[-1])
        self.pairs = self.pair_of_row[: self.kept]
        self.tokens = self.pairs // self.k
        self.x = torch.randn(self.t, d, device=DEVICE, dtype=dtype)
        self.rows = torch.randn(self.t * self.k, d, device=DEVICE, dtype=dtype)
        self.rows[self.kept :] = float("nan")
        self.weights = torch.rand(self.t, self.k, device=DEVICE) + 0.1

    def sums(self, rows: torch.Tensor, scale: bool) -> torch.Tensor:
        """What sum_rows means: the kept rows, added to their tokens."""
        rows = rows[: self.kept].double()
        if scale:
            rows = rows * self.weights.double().flatten()[self.pairs, None]
        return torch.zeros(self.t, rows.shape[1], device=DEVICE, dtype=torch.float64).index_add(
            0, self.tokens, rows
        )

    def of_pairs(self, values: torch.Tensor) -> torch.Tensor:
        """Values of kept rows (n) as (t k), 0 for dropped pairs."""
        flat = torch.zeros(self.t * self.k, device=DEVICE, dtype=torch.float64)
        flat[self.pairs] = values.double()
        return flat.view(self.t, self.k)


def close(ours: torch.Tensor, truth: torch.Tensor) -> None:
    assert_as_accurate(ours, truth.to(ours.dtype), truth, ulps=4)


@ROUTINGS
@DTYPES
def test_gathered_rows_are_their_tokens_times_their_weights(name, dtype, poisoned_memory):
    case = Case(name, dtype)
    tokens = case.pair_of_row // case.k
    assert torch.equal(gather_rows(case.x, case.pair_of_row, case.k), case.x[tokens])
    scaled = gather_rows(case.x, case.pair_of_row, case.k, case.weights)
    close(scaled, case.x.double()[tokens] * case.weights.double().flatten()[case.pair_of_row, None])


@ROUTINGS
@DTYPES
def test_summed_rows_leave_out_what_nobody_owns(name, dtype, poisoned_memory):
    case = Case(name, dtype)
    plan = (case.row_of_pair, case.offsets, case.k)
    close(sum_rows(case.rows, *plan, None), case.sums(case.rows, scale=False))
    close(sum_rows(case.rows, *plan, case.weights), case.sums(case.rows, scale=True))


@pytest.mark.parametrize("splits", [2, 5])
def test_summed_rows_may_come_in_parts(splits, poisoned_memory):
    case = Case("some pairs dropped")
    parts = torch.stack([torch.randn_like(case.rows) for _ in range(splits)])
    parts[:, case.kept :] = float("nan")
    ours = sum_rows(parts, case.row_of_pair, case.offsets, case.k, case.weights, dtype=torch.float16)
    assert ours.dtype == torch.float16
    close(ours, case.sums(parts.double().sum(0), scale=True))


@pytest.mark.parametrize(("splits", "most"), [(1, 2), (2, 4), (3, 1)])
def test_more_choices_than_are_written_out_are_summed_in_the_same_order(splits, most, monkeypatch):
    """The last of several rounds is not full: 5 choices in rounds of 2."""
    experts = drop(random_experts(11, 5, 7), 7, tokens=(3,), pairs=((0, 4),))
    _, row_of_pair, offsets = (part.to(DEVICE) for part in reference.sort_by_expert(experts, 7))
    rows, weights = torch.randn(splits, 55, D, device=DEVICE), torch.rand(11, 5, device=DEVICE)
    rows[:, int(offsets[-1]) :] = float("nan")
    rows, scaled = (rows[0] if splits == 1 else rows), (None, weights)
    at_once = [sum_rows(rows, row_of_pair, offsets, 5, scale) for scale in scaled]
    monkeypatch.setattr("moe_triton.rows.MOST_LOADS", most)
    in_rounds = [sum_rows(rows, row_of_pair, offsets, 5, scale) for scale in scaled]
    for ours, expected in zip(in_rounds, at_once, strict=True):
        assert expected.isfinite().all() and torch.equal(ours, expected)


@ROUTINGS
@DTYPES
def test_gradients_of_combine_are_scaled_tokens_and_dot_products(name, dtype, poisoned_memory):
    case = Case(name, dtype)
    of_rows, of_weights = combine_grads(case.x, case.rows, case.weights, case.pair_of_row, case.offsets)
    expected = torch.zeros_like(case.rows, dtype=torch.float64)
    expected[: case.kept] = case.weights.double().flatten()[case.pairs, None] * case.x.double()[case.tokens]
    close(of_rows, expected)
    dots = (case.rows[: case.kept].double() * case.x.double()[case.tokens]).sum(1)
    close(of_weights, case.of_pairs(dots))
    assert torch.equal(row_dots(case.rows, case.x, case.pair_of_row, case.offsets, case.weights), of_weights)


@ROUTINGS
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_gradients_of_weights_are_summed_parts_and_the_bias_seen_by_the_gradient(name, bias, poisoned_memory):
    case = Case(name, d=150)
    parts = torch.randn(3, case.t * case.k, device=DEVICE)
    parts[:, case.kept :] = float("nan")
    down_bias = torch.randn(case.e, 300, device=DEVICE)[:, ::2] if bias else None
    ours = weight_grads(parts, case.pair_of_row, case.offsets, case.weights, case.x, down_bias)
    expected = parts[:, : case.kept].double().sum(0)
    if down_bias is not None:
        owners = torch.repeat_interleave(torch.arange(case.e, device=DEVICE), case.offsets.diff())
        expected = expected + (case.x.double()[case.tokens] * down_bias.double()[owners]).sum(1)
    close(ours, case.of_pairs(expected))


@ROUTINGS
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "tokens"])
def test_sums_over_an_expert_are_zero_where_it_has_no_rows(name, gather, poisoned_memory):
    case = Case(name, d=70)
    own = case.x.double()[case.tokens] if gather else case.rows[: case.kept].double()
    owners = torch.repeat_interleave(torch.arange(case.e, device=DEVICE), case.offsets.diff())
    expected = torch.zeros(case.e, 70, device=DEVICE, dtype=torch.float64)
    if not gather:
        ours = expert_sums(case.rows, case.offsets, None, case.k, None, dtype=torch.float32)
        close(ours, expected.index_add(0, owners, own))
        return
    arguments = (case.x, case.offsets, case.pair_of_row, case.k)
    close(expert_sums(*arguments, None, dtype=torch.float32), expected.index_add(0, owners, own))
    scaled = own * case.weights.double().flatten()[case.pairs, None]
    ours = expert_sums(*arguments, case.weights, dtype=torch.float32)
    close(ours, expected.index_add(0, owners, scaled))


@ROUTINGS
def test_rows_of_nobody_become_zero_and_the_others_stay(name):
    case = Case(name)
    before = case.rows.clone()
    zero_rest(case.rows, case.offsets)
    assert torch.equal(case.rows[: case.kept], before[: case.kept])
    assert (case.rows[case.kept :] == 0).all()


def test_rows_may_be_wider_than_a_block(poisoned_memory):
    case = Case("odd sizes", d=2100)
    close(
        sum_rows(case.rows, case.row_of_pair, case.offsets, case.k, None), case.sums(case.rows, scale=False)
    )
    assert torch.equal(
        dispatch(case.x, case.pair_of_row, case.row_of_pair, case.k), case.x[case.pair_of_row // 3]
    )


def test_dispatch_and_combine_refuse_what_does_not_fit():
    case = Case("odd sizes")
    with pytest.raises(ValueError, match=r"pair_of_row has shape \(39,\), expected \(26,\)"):
        dispatch(case.x, case.pair_of_row, case.row_of_pair, 2)
    with pytest.raises(ValueError, match=r"rows has shape \(38, 37\), expected \(39, 37\)"):
        combine(case.rows[1:], case.weights, case.row_of_pair, case.offsets)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 700), (0, 8), (8,)], ids=str)
def test_activations_follow_their_formulas_in_value_and_gradient(
    activation, interleaved, shape, poisoned_memory
):
    if interleaved and activation not in GATED:
        pytest.skip("nothing to interleave without a gate")
    pre = (3 * torch.randn(shape, device=DEVICE)).requires_grad_()
    wide = pre.detach().double().requires_grad_()
    settings = {"interleaved": interleaved, "limit": 0.8, "alpha": 1.3}
    ours, truth = activate(pre, activation, **settings), reference.activate(wide, activation, **settings)
    close(ours, truth)
    upstream = torch.randn_like(truth)
    of_ours, of_truth = (
        torch.autograd.grad(y, leaf, upstream.to(y.dtype)) for y, leaf in ((ours, pre), (truth, wide))
    )
    close(of_ours[0], of_truth[0])
    with torch.no_grad():
        assert torch.equal(activate(pre, activation, **settings), ours)


def test_an_activation_takes_any_strides():
    pre = torch.randn(12, 10, device=DEVICE).mT
    close(activate(pre, "swiglu"), reference.activate(pre.double(), "swiglu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_of_nan_is_nan_as_in_the_reference(activation):
    """A clamp that swallows NaN would hide a run that has gone wrong."""
    nan = float("nan")
    values = torch.tensor([[1.0, nan, 2.0, 3.0], [nan, 1.0, 0.5, nan]])
    pre, wide = values.to(DEVICE).requires_grad_(), values.to(DEVICE).double().requires_grad_()
    ours, truth = activate(pre, activation), reference.activate(wide, activation)
    torch.testing.assert_close(ours.double(), truth, equal_nan=True, rtol=1e-5, atol=1e-5)
    of_ours, of_truth = (torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in ((ours, pre), (truth, wide)))
    torch.testing.assert_close(of_ours.double(), of_truth, equal_nan=True, rtol=1e-5, atol=1e-5)
