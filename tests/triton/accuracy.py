"""The comparison that these tests share: the kernels against float64, and against torch in the same dtype."""

from collections.abc import Callable, Iterable

import torch
from device import DEVICE, INTERPRETED
from helpers import (
    LEAVES,
    Apply,
    Problem,
    assert_as_accurate,
    by_loops,
    by_ops,
    one_expert_at_a_time,
    solve,
)
from torch import Tensor

import moe_triton

Solution = dict[str, Tensor]
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts bits off a bfloat16
DTYPES = [torch.float32, HALF]  # few, because a GPU compiles every kernel for each of them


def as_stored(problem: Problem) -> Problem:
    """The tensors as they are."""
    return problem


def random_upstream(problem: Problem) -> Tensor:
    """An incoming gradient (t d) in the dtype of x."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(problem.x.shape, generator=generator, dtype=torch.float64).to(problem.x.dtype)


def solve_here(
    apply: Apply,
    problem: Problem,
    upstream: Tensor | None = None,
    wanted: Iterable[str] = LEAVES,
    stored: Callable[[Problem], Problem] = as_stored,
) -> Solution:
    """Value and gradients on this process's device, brought to the CPU.

    `stored` may lay out the tensors of the device in another way.
    """
    upstream = random_upstream(problem) if upstream is None else upstream
    solution = solve(apply, stored(problem.on(DEVICE)), upstream.to(DEVICE), wanted)
    return {name: tensor.cpu() for name, tensor in solution.items()}


def kernels(problem: Problem, upstream: Tensor | None = None, **options) -> Solution:
    """What experts_ffn of moe_triton makes of a problem."""
    return solve_here(by_ops(moe_triton), problem, upstream, **options)


def expected(problem: Problem, upstream: Tensor | None = None) -> tuple[Solution, Solution]:
    """The truth in float64, and what torch makes of it in the problem's dtype on the same device."""
    upstream = random_upstream(problem) if upstream is None else upstream
    truth = solve(by_loops, problem.to(torch.float64), upstream.cpu().double())
    return truth, solve_here(one_expert_at_a_time, problem, upstream)


def assert_solved(ours: Solution, answers: tuple[Solution, Solution]) -> None:
    """The value and every gradient that is there, in the dtype that torch gives it.

    A few numbers may be exact in torch by luck, so there is room for some ulps. bfloat16 has more in the
    interpreter, which cuts bits off where a device rounds.
    """
    truth, torch_same_dtype = answers
    for name, our in ours.items():
        their = torch_same_dtype[name]
        assert our.dtype == their.dtype, f"{name}: {our.dtype}, expected {their.dtype}"
        cut = INTERPRETED and our.dtype == torch.bfloat16
        factor, ulps = (8, 8) if cut else (2, 16 if our.dtype == torch.float32 else 4)
        assert_as_accurate(our, their, truth[name], factor=factor, ulps=ulps, name=name)


def assert_same_bits(ours: Solution, theirs: Solution) -> None:
    """Every number, to the last bit; NaN fails."""
    assert ours.keys() == theirs.keys()
    for name, our in ours.items():
        assert torch.equal(our, theirs[name]), name
