"""Same inputs, same bits; outputs that do not depend on the batch; what is kept for the backward."""

from dataclasses import replace

import pytest
import torch
from accuracy import HALF, assert_same_bits, kernels, random_upstream
from device import DEVICE, INTERPRETED
from helpers import by_ops, drop, make_problem, random_experts
from torch import Tensor
from triton.runtime import interpreter

import moe_triton
from moe_triton import replay

TOKENS = 40 if INTERPRETED else 300


def busy_problem(dtype, tokens=TOKENS, **changes):
    """Several row tiles an expert, some pairs dropped."""
    experts = drop(random_experts(tokens, 2, 4, among=range(3)), 4, tokens=(7,), pairs=((3, 1),))
    return replace(make_problem(experts, 4, 64, 48, dtype=dtype), **changes)


def run_last_program_first(monkeypatch):
    """The interpreter runs the programs of a grid in the other order; a GPU runs them in any."""
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx

    def backwards(*place):
        forwards(*(n - 1 - i for n, i in zip(builder.grid_dim, place, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backwards)


@pytest.mark.parametrize(
    ("dtype", "weights_on_input"), [(torch.float32, False), (HALF, False), (HALF, True)], ids=str
)
def test_the_same_inputs_give_the_same_bits_in_any_order_of_programs(dtype, weights_on_input, monkeypatch):
    """Two programs that write one number would leave the one or the other."""
    problem = busy_problem(dtype, weights_on_input=weights_on_input)
    first = kernels(problem)
    if INTERPRETED:
        run_last_program_first(monkeypatch)
    for _ in range(1 if INTERPRETED else 5):
        assert_same_bits(kernels(problem), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_calls_that_come_again_look_at_their_own_tensors(dtype, monkeypatch):
    """A replay (moe_triton.replay) knows shapes and takes the memory of the call; three layers take turns."""
    experts = [random_experts(TOKENS, 2, 4, seed) for seed in range(3)]
    problems = [make_problem(e, 4, 64, 48, dtype=dtype, seed=seed) for seed, e in enumerate(experts)]
    with monkeypatch.context() as patch:
        patch.setattr(replay, "_is_replayable", lambda _: False)
        first = [kernels(problem) for problem in problems]
    played = []
    play = replay.Tape.play
    monkeypatch.setattr(replay.Tape, "play", lambda tape, *given: (played.append(1), play(tape, *given))[1])
    for _ in range(4):
        for problem, solution in zip(problems, first, strict=True):
            assert_same_bits(kernels(problem), solution)
    assert len(played) == 2 * (4 * 3 - 1), "all but the first, forward and backward"


def picked(problem, tokens):
    """The problem of some of the tokens, in the given order."""
    fields = ("experts", "x", "weights")
    return replace(problem, **{name: getattr(problem, name)[tokens] for name in fields})


@pytest.mark.parametrize(
    ("weights_on_input", "dtype"), [(False, torch.float32), (False, HALF), (True, HALF)], ids=str
)
def test_a_batch_invariant_output_has_the_same_bits_in_every_company(weights_on_input, dtype):
    """Alone, among few, among many, in another order: the schedule is that of any number of tokens."""
    problem = busy_problem(dtype, weights_on_input=weights_on_input)
    apply = by_ops(moe_triton, batch_invariant=True)

    def outputs(tokens):
        company = picked(problem, tokens).on(DEVICE)
        with torch.no_grad():
            return apply(company, **company.leaves)

    everybody = outputs(torch.arange(TOKENS))
    for tokens in (
        torch.tensor([5]),
        torch.tensor([3]),
        torch.tensor([9, 5, 7, 1]),
        torch.arange(TOKENS).flip(0),
        torch.arange(TOKENS).repeat(2),
    ):
        assert torch.equal(outputs(tokens), everybody[tokens.to(DEVICE)])


def test_batch_invariant_training_gives_the_batch_invariant_output():
    problem = busy_problem(HALF)
    here, apply = problem.on(DEVICE), by_ops(moe_triton, batch_invariant=True)
    with torch.no_grad():
        inference = apply(here, **here.leaves)
    training = apply(here, **{name: leaf.requires_grad_() for name, leaf in here.leaves.items()})
    assert torch.equal(training, inference)


def test_arguments_are_left_as_they_were():
    problem = busy_problem(HALF).on(DEVICE)
    before = {name: leaf.clone() for name, leaf in problem.leaves.items()}
    upstream = random_upstream(problem).to(DEVICE)
    upstream_before = upstream.clone()
    kernels(problem, upstream)
    assert torch.equal(upstream, upstream_before)
    for name, leaf in problem.leaves.items():
        assert torch.equal(leaf, before[name]), name


# Memory


@pytest.mark.parametrize("weights_on_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_pass_keeps_x_and_the_pre_activation_and_no_other_activation(dtype, weights_on_input):
    """2 t d + 4 p h bytes in bfloat16. Gathered inputs would be p d, and so would outputs."""
    problem = busy_problem(dtype, weights_on_input=weights_on_input).on(DEVICE)
    leaves = {name: leaf.requires_grad_() for name, leaf in problem.leaves.items()}
    names = {leaf.untyped_storage().data_ptr(): name for name, leaf in leaves.items()}
    kept: dict[str, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel():
            storage = tensor.untyped_storage()
            kept[names.get(storage.data_ptr(), f"activation {storage.data_ptr()}")] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        by_ops(moe_triton)(problem, **leaves)
    activations = [size for name, size in kept.items() if name.startswith("activation")]
    (tokens, top_k), (d, h) = problem.experts.shape, problem.down_proj.shape[1:]
    assert activations == [dtype.itemsize * tokens * top_k * 2 * h]
    assert kept["x"] == dtype.itemsize * tokens * d


@pytest.fixture
def allocated(monkeypatch) -> list[torch.Size]:
    """The shapes of all tensors that the kernels' launchers allocate."""
    shapes: list[torch.Size] = []

    def noted(allocate):
        def allocate_and_note(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            shapes.append(tensor.shape)
            return tensor

        return allocate_and_note

    for name in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like"):
        monkeypatch.setattr(torch, name, noted(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided", "new_zeros"):
        monkeypatch.setattr(Tensor, name, noted(getattr(Tensor, name)))
    return shapes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_makes_no_pre_activation(mode, allocated):
    problem = busy_problem(HALF).on(DEVICE)
    apply = by_ops(moe_triton)
    pre = torch.Size((problem.experts.numel(), problem.up_proj.shape[1]))
    with mode():
        allocated.clear()
        inference = apply(problem, **problem.leaves)
        assert pre not in allocated
    training = apply(problem, **{name: leaf.requires_grad_() for name, leaf in problem.leaves.items()})
    assert pre in allocated
    assert torch.equal(inference, training.detach())
