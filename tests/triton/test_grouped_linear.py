"""grouped_linear and its two gradients: rows meet the expert that owns them, and rows of nobody meet none."""

import pytest
import torch
from accuracy import DTYPES, HALF, assert_solved, expected, solve_here
from device import DEVICE
from helpers import ACTIVATIONS, AWKWARD_ROUTINGS, by_composition, make_problem, spread, stored_transposed

import moe_triton

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OWNERS = {
    "empty experts": ([0, 3, 3, 4, 8], 10),
    "all rows owned": ([0, 8, 9, 40, 70], 70),
    "first and last empty": ([0, 0, 33, 33, 33], 40),
    "nobody owns any": ([0, 0, 0, 0, 0], 3),
    "no rows": ([0, 0, 0, 0, 0], 0),
}


def randn(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def linear_of_each_owner(rows, weight, offsets, bias=None):
    """What a user of torch writes; rows of nobody are 0."""
    out = [rows.new_zeros(0, weight.shape[1])]
    for expert, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        own_bias = None if bias is None else bias[expert]
        out.append(torch.nn.functional.linear(rows[first:end], weight[expert], own_bias))
    kept = int(offsets[-1])
    return torch.cat([*out, rows.new_zeros(rows.shape[0] - kept, weight.shape[1])])


def solve_linear(apply, leaves, offsets, upstream):
    """The value and the gradients of rows, weight and bias, on the CPU."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    out = apply(leaves["rows"], leaves["weight"], offsets, leaves.get("bias"))
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach().cpu()} | {n: g.cpu() for n, g in zip(leaves, grads, strict=True)}


def zeroed(tensor, kept):
    tensor = tensor.clone()
    tensor[kept:] = 0
    return tensor


@EVERY_DTYPE
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(32, 48, True), (7, 5, False)], ids=str)
@pytest.mark.parametrize("case", OWNERS)
def test_each_row_meets_its_owner(case, inputs, outputs, bias, dtype, poisoned_memory):
    """Rows of nobody hold NaN, in the rows and in the incoming gradient; what comes out of them is 0."""
    offsets, number = torch.tensor(OWNERS[case][0]), OWNERS[case][1]
    kept = int(offsets[-1])
    clean = {
        "rows": zeroed(randn(number, inputs, dtype=dtype), kept),
        "weight": randn(4, outputs, inputs, dtype=dtype, seed=1),
    }
    if bias:
        clean["bias"] = randn(4, outputs, dtype=dtype, seed=2)
    upstream = zeroed(randn(number, outputs, dtype=dtype, seed=3), kept)
    truth = solve_linear(
        linear_of_each_owner, {n: t.double() for n, t in clean.items()}, offsets, upstream.double()
    )
    here = {name: tensor.to(DEVICE) for name, tensor in clean.items()}
    baseline = solve_linear(linear_of_each_owner, here, offsets.to(DEVICE), upstream.to(DEVICE))
    rows, poisoned_upstream = here["rows"].clone(), upstream.to(DEVICE)
    rows[kept:], poisoned_upstream[kept:] = float("nan"), float("nan")
    ours = solve_linear(
        moe_triton.grouped_linear, here | {"rows": rows}, offsets.to(DEVICE), poisoned_upstream
    )
    assert_solved(ours, (truth, baseline))
    is_empty = offsets.diff() == 0
    for name in ("weight", "bias")[: 1 + bias]:
        assert not ours[name][is_empty].any(), name
    assert not ours["out"][kept:].any()
    assert not ours["rows"][kept:].any()


@pytest.mark.parametrize("layout", [stored_transposed, spread], ids=["transposed", "strided"])
@pytest.mark.parametrize("which", ["rows", "weight", "bias", "upstream"])
def test_any_of_its_tensors_may_have_any_strides(which, layout):
    offsets = torch.tensor([0, 3, 20, 20, 33], device=DEVICE)
    shapes = {"rows": (35, 32), "weight": (4, 48, 32), "bias": (4, 48), "upstream": (35, 48)}
    dense = {name: randn(*shape, dtype=HALF).to(DEVICE) for name, shape in shapes.items()}
    leaves = dense | {which: layout(dense[which])}
    ours, theirs = (
        solve_linear(moe_triton.grouped_linear, {n: case[n] for n in ("rows", "weight", "bias")}, offsets,
                     case["upstream"])
        for case in (leaves, dense)
    )  # fmt: skip
    truth = {name: tensor.double() for name, tensor in theirs.items()}
    assert_solved(ours, (truth, theirs))


@EVERY_DTYPE
def test_the_two_gradients_may_be_called_alone(dtype, poisoned_memory):
    offsets = torch.tensor([0, 3, 20, 20, 33], device=DEVICE)
    rows, grad, weight = (
        randn(*shape, dtype=dtype, seed=seed).to(DEVICE)
        for seed, shape in enumerate([(35, 32), (35, 48), (4, 48, 32)])
    )
    through_autograd = solve_linear(
        moe_triton.grouped_linear, {"rows": rows, "weight": weight}, offsets, grad
    )
    rows[33:], grad[33:] = float("nan"), float("nan")
    assert torch.equal(
        moe_triton.grouped_linear_grad_rows(grad, weight, offsets).cpu(), through_autograd["rows"]
    )
    assert torch.equal(
        moe_triton.grouped_linear_grad_weight(grad, rows, offsets).cpu(), through_autograd["weight"]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_gradient_of_a_weight_adds_to_a_float32_main_gradient(dtype, poisoned_memory):
    """What is there stays there: over two micro-batches the sum is that of both, in float32."""
    offsets = torch.tensor([0, 3, 20, 20, 33], device=DEVICE)
    before = randn(4, 48, 32, dtype=torch.float32).to(DEVICE)
    main, truth = before.clone(), before.double()
    for seed in (1, 2):
        grad, rows = (randn(35, width, dtype=dtype, seed=seed + width).to(DEVICE) for width in (48, 32))
        for expert, (first, end) in enumerate([(0, 3), (3, 20), (20, 20), (20, 33)]):
            truth[expert] += grad[first:end].double().T @ rows[first:end].double()
        grad[33:], rows[33:] = float("nan"), float("nan")
        moe_triton.grouped_linear_grad_weight(grad, rows, offsets, out=main)
    assert torch.equal(main[2], before[2])
    torch.testing.assert_close(main.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", AWKWARD_ROUTINGS)
def test_the_level_1_operations_compose(name, poisoned_memory):
    problem = make_problem(*AWKWARD_ROUTINGS[name], dtype=HALF)
    assert_solved(solve_here(by_composition(moe_triton), problem), expected(problem))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_composes(activation, poisoned_memory):
    problem = make_problem(*AWKWARD_ROUTINGS["odd sizes"], activation=activation, dtype=HALF)
    assert_solved(solve_here(by_composition(moe_triton), problem), expected(problem))
