"""experts_ffn of the Triton kernels gives the value and every gradient that float64 loops give."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from accuracy import (
    HALF,
    assert_same_bits,
    assert_solved,
    expected,
    kernels,
    random_upstream,
)
from device import DEVICE, INTERPRETED
from helpers import (
    ACTIVATIONS,
    AWKWARD_ROUTINGS,
    GATED,
    LEAVES,
    drop,
    make_problem,
    random_experts,
    spread,
    stored_transposed,
)

NAN, INF = float("nan"), float("inf")
BOTH_HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
PROJECTIONS = ("up_proj", "down_proj")
BIASES = {
    "two biases": (),
    "no bias": ("up_bias", "down_bias"),
    "up_bias": ("down_bias",),
    "down_bias": ("up_bias",),
}
SIZES = [(64, 48, HALF), (72, 20, HALF), (72, 20, torch.float32)]  # rows of 16 bytes, for tma, and others


def some_dropped(top_k: int = 2):
    """Experts of 11 tokens: one expert empty, one token without any, one pair dropped."""
    return drop(random_experts(11, top_k, 5, among=range(4)), 5, tokens=(2,), pairs=((4, 0),)), 5


def without(problem, names):
    return replace(problem, **dict.fromkeys(names))


# Value and every gradient


AWKWARD = [(name, HALF) for name in AWKWARD_ROUTINGS] + [
    (name, torch.float32)
    for name in AWKWARD_ROUTINGS
    if INTERPRETED or name in ("some pairs dropped", "one row per expert")  # a GPU compiles for each of them
]


@pytest.mark.parametrize(("name", "dtype"), AWKWARD, ids=str)
def test_sorting_does_not_change_the_answer(name, dtype, poisoned_memory):
    problem = make_problem(*AWKWARD_ROUTINGS[name], dtype=dtype)
    ours = kernels(problem)
    assert_solved(ours, expected(problem))
    is_dropped = problem.experts == problem.num_experts
    assert not ours["weights"][is_dropped].any()
    is_empty = problem.plan.tokens_per_expert == 0
    for leaf in (*PROJECTIONS, "up_bias", "down_bias"):
        assert not ours[leaf][is_empty].any(), leaf


FORMS = [(a, False) for a in ACTIVATIONS] + [(a, True) for a in GATED]
FORMS_AND_BIASES = [
    (*form, bias) for form in FORMS for bias in BIASES if "_" not in bias or form == ("swiglu", False)
]


@pytest.mark.parametrize(("activation", "interleaved", "bias"), FORMS_AND_BIASES, ids=str)
def test_every_activation_has_its_formula_and_gradient(activation, interleaved, bias):
    problem = make_problem(*some_dropped(), activation=activation, interleaved=interleaved, dtype=HALF)
    problem = without(problem, BIASES[bias])
    assert_solved(kernels(problem), expected(problem))


@pytest.mark.parametrize(("d", "h", "dtype"), SIZES, ids=str)
def test_widths_need_not_divide(d, h, dtype, poisoned_memory):
    problem = make_problem(random_experts(29, 3, 5), 5, d, h, dtype=dtype)
    assert_solved(kernels(problem), expected(problem))


@BOTH_HALVES
def test_both_half_precisions_are_served(dtype):
    problem = make_problem(*some_dropped(), 64, 48, dtype=dtype)
    assert_solved(kernels(problem), expected(problem))


@BOTH_HALVES
def test_float32_weights_meet_narrower_experts(dtype):
    """A router works in float32; its gradient comes back in float32."""
    problem = make_problem(random_experts(19, 2, 6), 6, 64, 48, dtype=dtype)
    problem = replace(problem, weights=problem.weights.float())
    ours, (truth, baseline) = kernels(problem), expected(problem)
    assert ours["weights"].dtype == torch.float32
    for answer in (ours, baseline):  # the arithmetic is narrow, and so is the ulp
        answer["weights"] = answer["weights"].to(dtype)
    assert_solved(ours, (truth, baseline))


ON_INPUT = [
    (1, "swiglu", HALF),
    (2, "swiglu", torch.float32),
    (2, "clamped_swiglu", HALF),
    (2, "relu2", HALF),
]


@pytest.mark.parametrize(("top_k", "activation", "dtype"), ON_INPUT, ids=str)
def test_weights_on_input_scale_what_an_expert_reads(top_k, activation, dtype, poisoned_memory):
    problem = make_problem(*some_dropped(top_k), activation=activation, weights_on_input=True, dtype=dtype)
    assert_solved(kernels(problem), expected(problem))


# Memory layouts


def one_for_all(problem):
    """An expanded weight has stride 0 along e; its gradient is not summed, each expert has its own."""
    names = (*PROJECTIONS, "up_bias", "down_bias")
    return replace(problem, **{n: getattr(problem, n)[:1].expand_as(getattr(problem, n)) for n in names})


def changed(how, *names):
    return lambda problem: replace(problem, **{name: how(getattr(problem, name)) for name in names})


LAYOUTS = {
    "projections (e i o)": changed(stored_transposed, *PROJECTIONS),
    "strided projections": changed(spread, *PROJECTIONS),
    "every second expert": changed(lambda t: t.repeat_interleave(2, dim=0)[::2], *PROJECTIONS),
    "strided biases and weights": changed(spread, "up_bias", "down_bias", "weights"),
    "transposed x and weights": changed(stored_transposed, "x", "weights"),
    "strided x": changed(spread, "x"),
    "x in wider rows": changed(lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]], "x"),
    "one expert's memory for all": one_for_all,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_may_have_any_strides(layout):
    problem = make_problem(*some_dropped(), 64, 48, dtype=HALF)
    if layout == "one expert's memory for all":
        problem = changed(torch.clone, *PROJECTIONS, "up_bias", "down_bias")(one_for_all(problem))
    ours = kernels(problem, stored=LAYOUTS[layout])
    assert_solved(ours, expected(problem))


def test_x_may_be_one_token_for_all():
    problem = make_problem(*some_dropped(), dtype=HALF)
    problem = replace(problem, x=problem.x[:1].repeat(11, 1))
    stored = changed(lambda x: x[:1].expand(11, -1), "x")
    assert_solved(kernels(problem, stored=stored), expected(problem))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "strided", "zero"])
def test_incoming_gradients_may_have_any_strides(kind):
    problem = make_problem(*some_dropped(), dtype=HALF)
    dense = random_upstream(problem).to(DEVICE)
    upstream = {
        "expanded": dense.new_ones(()).expand(11, 6),
        "transposed": stored_transposed(dense),
        "strided": spread(dense),
        "zero": dense.new_zeros(1, 6).expand(11, 6),
    }[kind]
    assert_solved(kernels(problem, upstream), expected(problem, upstream.contiguous()))


# What is dropped, asked for, kept


@pytest.mark.parametrize(("weights_on_input", "poison"), [(False, NAN), (False, INF), (True, NAN)])
def test_what_a_dropped_token_holds_reaches_nothing(weights_on_input, poison, poisoned_memory):
    experts = drop(random_experts(9, 2, 4), 4, tokens=(0, 3, 8))
    clean = make_problem(experts, 4, weights_on_input=weights_on_input, dtype=HALF)
    x, upstream = clean.x.clone(), random_upstream(clean)
    x[[0, 3, 8]], upstream[[0, 3, 8]] = poison, poison
    ours = kernels(replace(clean, x=x), upstream)
    assert_solved(ours, expected(clean))
    for name in ("y", "x", "weights"):
        assert (ours[name][[0, 3, 8]] == 0).all(), name


@cache
def problem_and_every_gradient(weights_on_input):
    problem = make_problem(*some_dropped(), weights_on_input=weights_on_input, dtype=HALF)
    return problem, kernels(problem)


WANTED = [(False, (leaf,)) for leaf in LEAVES] + [(False, ("x", "weights")), (False, PROJECTIONS)]
WANTED += [(True, (leaf,)) for leaf in ("x", "weights", "up_proj")]


@pytest.mark.parametrize(("weights_on_input", "wanted"), WANTED, ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(weights_on_input, wanted, poisoned_memory):
    problem, everything = problem_and_every_gradient(weights_on_input)
    part = kernels(problem, wanted=wanted)
    assert part.keys() == {"y", *wanted}
    assert_same_bits(part, {name: everything[name] for name in part})
